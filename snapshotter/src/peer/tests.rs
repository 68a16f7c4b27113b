//! Fetching from scripted peers: real connections to servers that serve, lack, lie, stall or hang
//! up.
//!
//! Each test makes some content (a memory image with its file tree: every kind of object, five
//! levels), lets scripted nodes serve parts of it, and looks at what arrived, from which node, and
//! which was asked how often.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use godwit_protos::Digest;
use godwit_protos::peer::peer_server::{Peer, PeerServer};
use godwit_protos::peer::{
    BlobPiece, DescribeRequest, DescribeResponse, FetchObjectsRequest, ForgetRequest,
    ForgetResponse, FromSource, HelloRequest, HelloResponse, ImageHeld, KeepRequest, KeepResponse,
    LocateRequest, LocateResponse, MakeLayerProgress, MakeLayerRequest, MigrateRequest, Object,
    ObjectBatch, OwnershipRequest, OwnershipResponse, PlanResponse, Progress, ReadBlobRequest,
    ToSource,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use super::fetch::{Brought, Depth, FetchError, Patience, Peers, fetch_within};
use super::{Connection, PeerError, Version};
use crate::config::Config;
use crate::content::Sink as _;
use crate::content::capture::{Unchanged, capture};
use crate::content::fake::Objects;
use crate::content::object::{Kind, Map, Memory, Object as _, PAGE_BYTES, Pages};
use crate::store::{Lease, Options, Store};

/// Long enough for an honest peer on a busy machine, short enough to wait for.
const PATIENCE: Patience = Patience {
    grace: Duration::from_millis(800),
    neighbour: Duration::from_millis(1500),
    source: Duration::from_millis(2000),
};

/// No fetch may take longer, whatever the peers do.
const LIMIT: Duration = Duration::from_secs(30);

/// How many requests of one fetch a peer may see that fails each: those on their way at once.
const REQUESTS_AT_ONCE: usize = 2;

/// Levels of [`Content`].
const LEVELS: usize = 5;

/// What a peer does when it is asked for objects. Those that fail send one good object first where
/// that says more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Script {
    Honest,
    /// Honest, with this many milliseconds in front of each answer.
    Slow(u64),
    /// Honest for this many objects in all, then answers with an error.
    HonestFor(usize),
    /// Never answers the call.
    Silent,
    /// One object, then nothing, with the stream left open.
    Stalls,
    /// One object, then the end, with no word on the others.
    Ends,
    /// One object, then an error.
    Breaks,
    /// An error instead of a stream.
    Fails,
    /// One object at a time, each in good time for the next message but not for the whole.
    Trickles,
    /// Messages of nothing without end.
    Chatters,
    /// Other bytes under the right digest.
    WrongBytes,
    /// A sound object that was not asked for, next to those that were.
    Unasked,
    /// Announces an object that is larger than any.
    TooLarge,
    /// Says zstd, sends noise.
    Garbage,
    /// An encoding that there is not.
    UnknownEncoding,
    /// A digest of three bytes.
    ShortDigest,
    /// The first object twice, then the others.
    Twice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Greeting {
    Welcomes,
    Refuses,
    SpeaksAnotherVersion,
    Silent,
}

/// A node of a test: what it has, what it does, and what it saw.
struct Scripted {
    name: String,
    greeting: Greeting,
    script: Script,
    objects: HashMap<Digest, Vec<u8>>,
    asked: Mutex<Vec<Vec<Digest>>>,
    /// What it answers to a lookup; nothing at all without it.
    located: Option<LocateResponse>,
    /// What it sends for any blob.
    sends: Option<Sends>,
}

/// How a scripted node sends a blob.
#[derive(Clone)]
pub(crate) struct Sends {
    /// The length that it says.
    pub(crate) announced: u64,
    /// What it sends, from where it is asked.
    pub(crate) bytes: Vec<u8>,
    /// Whether an error comes behind.
    pub(crate) breaks: bool,
}

impl Sends {
    /// All of it, whatever it is.
    pub(crate) fn all(bytes: Vec<u8>) -> Self {
        Self { announced: bytes.len() as u64, bytes, breaks: false }
    }
}

impl Scripted {
    /// The digests it was asked for, request by request.
    fn requests(&self) -> Vec<Vec<Digest>> {
        self.asked.lock().unwrap().clone()
    }

    fn asked(&self) -> BTreeSet<Digest> {
        self.requests().into_iter().flatten().collect()
    }

    /// A message with those of `digests` that it has; the others are named as missing.
    fn answer(&self, digests: &[Digest]) -> ObjectBatch {
        let mut batch = ObjectBatch::default();
        for digest in digests {
            match self.objects.get(digest) {
                Some(bytes) => batch.objects.push(object(digest, bytes)),
                None => batch.missing.push(digest.as_bytes().to_vec().into()),
            }
        }
        batch
    }

    /// What a lying peer makes of an honest answer.
    fn twist(&self, mut batch: ObjectBatch) -> ObjectBatch {
        let stray = b"a sound object that was not requested";
        match self.script {
            Script::Unasked => batch.objects.insert(0, object(&Digest::of(stray), stray)),
            Script::Twice => {
                let first = batch.objects.first().cloned();
                batch.objects.extend(first);
            }
            _ => {
                for object in &mut batch.objects {
                    twist_object(self.script, object);
                }
            }
        }
        batch
    }

    /// Sends an answer as the script says; the call has been accepted.
    async fn play(&self, digests: &[Digest], send: mpsc::Sender<Result<ObjectBatch, Status>>) {
        let (first, _) = digests.split_at(1.min(digests.len()));
        match self.script {
            Script::Stalls => {
                let _ = send.send(Ok(self.answer(first))).await;
                send.closed().await;
            }
            Script::Ends => drop(send.send(Ok(self.answer(first))).await),
            Script::Breaks => {
                let _ = send.send(Ok(self.answer(first))).await;
                let _ = send.send(Err(Status::internal("the disk is on fire"))).await;
            }
            Script::Trickles => {
                for digest in digests {
                    tokio::time::sleep(PATIENCE.neighbour / 4).await;
                    if send.send(Ok(self.answer(std::slice::from_ref(digest)))).await.is_err() {
                        return;
                    }
                }
            }
            Script::Chatters => {
                while send.send(Ok(ObjectBatch::default())).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            // As the real server does: several messages, and an empty one at the end.
            Script::Honest | Script::Slow(_) | Script::HonestFor(_) => {
                for part in digests.chunks(50) {
                    let _ = send.send(Ok(self.answer(part))).await;
                }
                let _ = send.send(Ok(ObjectBatch::default())).await;
            }
            _ => drop(send.send(Ok(self.twist(self.answer(digests)))).await),
        }
    }
}

fn object(digest: &Digest, bytes: &[u8]) -> Object {
    let data = zstd::bulk::compress(bytes, 1).unwrap();
    let (encoding, data) = if data.len() < bytes.len() { (1, data) } else { (0, bytes.to_vec()) };
    Object {
        digest: digest.as_bytes().to_vec().into(),
        encoding,
        base: bytes::Bytes::new(),
        data: data.into(),
        size_bytes: u32::try_from(bytes.len()).unwrap(),
    }
}

fn twist_object(script: Script, object: &mut Object) {
    match script {
        Script::WrongBytes => {
            object.encoding = 0;
            object.data = vec![0x5a; object.size_bytes as usize].into();
        }
        Script::TooLarge => object.size_bytes = u32::MAX,
        Script::Garbage => {
            object.encoding = 1;
            object.data = vec![0x5a; 100].into();
        }
        Script::UnknownEncoding => object.encoding = 7,
        Script::ShortDigest => object.digest = vec![1, 2, 3].into(),
        other => panic!("{other:?} does not twist objects"),
    }
}

/// The service of a scripted node.
struct Service(Arc<Scripted>);

type Answer<T> = Result<Response<T>, Status>;

fn never<T>() -> Answer<T> {
    Err(Status::unimplemented("not in this script"))
}

#[tonic::async_trait]
impl Peer for Service {
    async fn hello(&self, _request: Request<HelloRequest>) -> Answer<HelloResponse> {
        match self.0.greeting {
            Greeting::Welcomes => {}
            Greeting::Refuses => return Err(Status::permission_denied("who are you")),
            Greeting::SpeaksAnotherVersion => {
                return Err(Status::failed_precondition("this node speaks versions 8 to 9"));
            }
            Greeting::Silent => std::future::pending().await,
        }
        Ok(Response::new(HelloResponse {
            version: Version::NEWEST as u32,
            node: self.0.name.clone(),
            ..HelloResponse::default()
        }))
    }

    type FetchObjectsStream = ReceiverStream<Result<ObjectBatch, Status>>;

    async fn fetch_objects(
        &self,
        request: Request<FetchObjectsRequest>,
    ) -> Answer<Self::FetchObjectsStream> {
        let digests = request.into_inner().digests;
        let digests: Vec<Digest> =
            digests.iter().map(|digest| Digest::try_from(&digest[..]).unwrap()).collect();
        let before = {
            let mut asked = self.0.asked.lock().unwrap();
            let before: usize = asked.iter().map(Vec::len).sum();
            asked.push(digests.clone());
            before
        };
        match self.0.script {
            Script::Silent => std::future::pending().await,
            Script::Fails => return Err(Status::unavailable("going down")),
            Script::HonestFor(count) if before >= count => {
                return Err(Status::unavailable("going down"));
            }
            Script::Slow(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
            _ => {}
        }
        let (send, receive) = mpsc::channel(1);
        let script = self.0.clone();
        tokio::spawn(async move { script.play(&digests, send).await });
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn locate(&self, _request: Request<LocateRequest>) -> Answer<LocateResponse> {
        match &self.0.located {
            Some(located) => Ok(Response::new(located.clone())),
            None => std::future::pending().await,
        }
    }

    type ReadBlobStream = ReceiverStream<Result<BlobPiece, Status>>;

    async fn read_blob(&self, request: Request<ReadBlobRequest>) -> Answer<Self::ReadBlobStream> {
        let Some(Sends { announced, bytes, breaks }) = self.0.sends.clone() else { return never() };
        let begin = usize::try_from(request.into_inner().offset).unwrap().min(bytes.len());
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(async move {
            for data in bytes[begin..].chunks(30_000) {
                let data = data.to_vec().into();
                let _ = send.send(Ok(BlobPiece { data, total_bytes: announced })).await;
            }
            if breaks {
                let _ = send.send(Err(Status::unavailable("going down"))).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    type HoldImageStream = ReceiverStream<Result<ImageHeld, Status>>;

    async fn hold_image(
        &self,
        _request: Request<DescribeRequest>,
    ) -> Answer<Self::HoldImageStream> {
        never()
    }

    type MakeLayerStream = ReceiverStream<Result<MakeLayerProgress, Status>>;

    async fn make_layer(
        &self,
        _request: Request<MakeLayerRequest>,
    ) -> Answer<Self::MakeLayerStream> {
        let (send, receive) = mpsc::channel(1);
        let script = self.0.script;
        tokio::spawn(async move {
            let progress = MakeLayerProgress { done_bytes: 1, ..MakeLayerProgress::default() };
            let _ = send.send(Ok(progress.clone())).await;
            if script == Script::Stalls {
                return send.closed().await;
            }
            while script == Script::Chatters && send.send(Ok(progress.clone())).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let root = Digest::of(b"root").as_bytes().to_vec().into();
            let _ = send.send(Ok(MakeLayerProgress { done_bytes: 7, root })).await;
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn describe(&self, _request: Request<DescribeRequest>) -> Answer<DescribeResponse> {
        never()
    }

    type HandOffStream = ReceiverStream<Result<FromSource, Status>>;

    async fn hand_off(
        &self,
        _request: Request<Streaming<ToSource>>,
    ) -> Answer<Self::HandOffStream> {
        never()
    }

    async fn ownership(&self, _request: Request<OwnershipRequest>) -> Answer<OwnershipResponse> {
        never()
    }

    type MigrateStream = ReceiverStream<Result<Progress, Status>>;

    async fn migrate(&self, _request: Request<MigrateRequest>) -> Answer<Self::MigrateStream> {
        never()
    }

    async fn plan(&self, _request: Request<MigrateRequest>) -> Answer<PlanResponse> {
        never()
    }

    async fn keep(&self, _request: Request<KeepRequest>) -> Answer<KeepResponse> {
        never()
    }

    async fn forget(&self, _request: Request<ForgetRequest>) -> Answer<ForgetResponse> {
        never()
    }
}

/// Starts a node on a free port. Returns it and the destination's configuration that names it.
async fn serve(node: Scripted) -> (Arc<Scripted>, Config) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let node = Arc::new(node);
    let service = PeerServer::new(Service(node.clone()));
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let text = format!(
        "node = 'destination'\n[[peers]]\nname = '{}'\naddress = '{address}'\n\
         [[peers]]\nname = 'other'\naddress = '{address}'",
        node.name
    );
    (node, toml::from_str(&text).unwrap())
}

/// Starts a node and connects to it.
async fn node(
    name: &str,
    script: Script,
    objects: HashMap<Digest, Vec<u8>>,
) -> (Arc<Scripted>, Arc<Connection>) {
    let greeting = Greeting::Welcomes;
    let (name, asked) = (name.to_owned(), Mutex::default());
    connect(Scripted { name, greeting, script, objects, asked, located: None, sends: None }).await
}

async fn connect(node: Scripted) -> (Arc<Scripted>, Arc<Connection>) {
    let (node, config) = serve(node).await;
    let connection = Connection::open(&config, &node.name, LIMIT).await.unwrap();
    (node, Arc::new(connection))
}

/// Starts a node that has no objects and answers every lookup so, or not at all, and connects to
/// it.
pub(crate) async fn locating(name: &str, located: Option<LocateResponse>) -> Arc<Connection> {
    let (name, asked, objects) = (name.to_owned(), Mutex::default(), HashMap::new());
    let (greeting, script) = (Greeting::Welcomes, Script::Honest);
    connect(Scripted { name, greeting, script, objects, asked, located, sends: None }).await.1
}

/// Starts a node that says it has the blob and begins to make a layer of it, whose object is of
/// `root`, and goes on by `script`; and connects to it.
pub(crate) async fn making(name: &str, blob: Digest, script: Script) -> Arc<Connection> {
    let (name, asked, objects) = (name.to_owned(), Mutex::default(), HashMap::new());
    let blobs = vec![blob.to_string()];
    let located = Some(LocateResponse { blobs, ..LocateResponse::default() });
    let greeting = Greeting::Welcomes;
    connect(Scripted { name, greeting, script, objects, asked, located, sends: None }).await.1
}

/// Starts a node that sends any blob so, and connects to it.
pub(crate) async fn sending(name: &str, sends: Sends) -> Arc<Connection> {
    let (name, asked, objects) = (name.to_owned(), Mutex::default(), HashMap::new());
    let (greeting, script, sends) = (Greeting::Welcomes, Script::Honest, Some(sends));
    connect(Scripted { name, greeting, script, objects, asked, located: None, sends }).await.1
}

/// Bytes that do not compress and are nowhere twice.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..bytes).map(step).collect()
}

/// What is to be fetched: a memory image of four blocks, and its file tree.
struct Content {
    root: (Kind, Digest),
    objects: HashMap<Digest, Vec<u8>>,
    /// The pages: one level of 1024 objects, eight batches.
    pages: HashSet<Digest>,
}

impl Content {
    fn new() -> Self {
        let mut sink = Objects::default();
        let files = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(files.path().join("etc/deep")).unwrap();
        std::fs::write(files.path().join("large"), noise(1, 600 << 10)).unwrap();
        std::fs::write(files.path().join("etc/text"), "godwit ".repeat(3000)).unwrap();
        std::fs::write(files.path().join("etc/deep/small"), "x").unwrap();
        std::os::unix::fs::symlink("large", files.path().join("link")).unwrap();
        let tree = capture(files.path(), &mut sink, &mut Unchanged::default()).unwrap();
        let mut pages = HashSet::new();
        let mut block = |number: u64| {
            let page = |slot: u8| noise(1000 + number * 256 + u64::from(slot), PAGE_BYTES);
            let slots: Vec<u8> = (0..=u8::MAX).collect();
            let put: Vec<Digest> =
                slots.iter().map(|slot| sink.put(&page(*slot)).unwrap()).collect();
            pages.extend(put.iter().copied());
            sink.put(&Pages { slots, pages: put }.encode()).unwrap()
        };
        let blocks: Vec<Digest> = (0..4).map(&mut block).collect();
        let map = Map { name: "pagemap-1".to_owned(), numbers: (0..4).collect(), blocks };
        let memory =
            Memory { images: Some(tree.tree), maps: vec![map], pages: 1024, areas: Vec::new() };
        let root = (Kind::Memory, sink.put(&memory.encode()).unwrap());
        Self { root, objects: sink.0, pages }
    }

    /// The objects for which `keep` holds.
    fn only(&self, keep: impl Fn(&Digest) -> bool) -> HashMap<Digest, Vec<u8>> {
        let kept = self.objects.iter().filter(|(digest, _)| keep(digest));
        kept.map(|(digest, bytes)| (*digest, bytes.clone())).collect()
    }

    /// About half of the pages and everything else but the root.
    fn some(&self) -> HashMap<Digest, Vec<u8>> {
        self.only(|digest| {
            let half = digest.as_bytes()[31] & 1 == 0;
            *digest != self.root.1 && (half || !self.pages.contains(digest))
        })
    }
}

/// The destination: a store of its own.
struct Destination {
    store: Store,
    lease: Arc<Lease>,
    _dir: tempfile::TempDir,
}

impl Destination {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { reserve_bytes: 0, ..Options::default() };
        let store = Store::open(dir.path(), options).unwrap();
        let lease = Arc::new(store.lease("test", Duration::from_secs(3600)));
        Self { store, lease, _dir: dir }
    }

    async fn fetch<'a>(
        &self,
        content: &Content,
        neighbours: &[&Arc<Connection>],
        source: impl Into<Option<&'a Arc<Connection>>>,
    ) -> Result<Brought, FetchError> {
        let neighbours = neighbours.iter().copied().cloned().collect();
        let source = source.into().cloned();
        let peers = Peers { neighbours, source, health: Arc::default() };
        let roots = [content.root];
        let work = fetch_within(&self.store, &self.lease, &peers, &roots, Depth::Content, PATIENCE);
        let done = tokio::time::timeout(LIMIT, work).await;
        Ok(done.expect("a fetch ends whatever the peers do")?.remove(0))
    }

    /// What has arrived, after a look that it is part of `content`, byte for byte, and nothing
    /// else.
    fn arrived(&self, content: &Content) -> HashSet<Digest> {
        // Counted first: a fetch that was dropped may still be storing its last message.
        let count = self.store.usage().unwrap().objects;
        let mut arrived = HashSet::new();
        for (digest, bytes) in &content.objects {
            if let Some(stored) = self.store.get(digest).unwrap() {
                assert!(stored == *bytes, "{digest} has other bytes");
                arrived.insert(*digest);
            }
        }
        assert!(count <= arrived.len() as u64, "strays");
        arrived
    }

    fn assert_has_all(&self, content: &Content) {
        assert_eq!(self.arrived(content).len(), content.objects.len());
    }
}

fn objects_from(brought: &Brought, node: &str) -> u64 {
    brought.get(node).map_or(0, |(objects, _)| *objects)
}

fn total(brought: &Brought) -> u64 {
    brought.values().map(|(objects, _)| objects).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_source_sends_only_what_no_neighbour_has() {
    let content = Content::new();
    let root = content.root.1;
    let (_, near) = node("near", Script::Honest, content.only(|digest| *digest != root)).await;
    let (source, far) = node("source", Script::Honest, content.objects.clone()).await;
    let here = Destination::new();
    let brought = here.fetch(&content, &[&near], &far).await.unwrap();
    here.assert_has_all(&content);
    assert_eq!(source.asked(), BTreeSet::from([root]));
    assert_eq!(brought["source"], (1, content.objects[&root].len() as u64));
    let bytes: usize = content.objects.values().map(Vec::len).sum();
    let others = (content.objects.len() - 1, bytes - content.objects[&root].len());
    assert_eq!(brought["near"], (others.0 as u64, others.1 as u64));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_neighbour_lacks_comes_from_the_source_and_nothing_else_does() {
    let content = Content::new();
    let some = content.some();
    let (near_node, near) = node("near", Script::Honest, some.clone()).await;
    let (source, far) = node("source", Script::Honest, content.objects.clone()).await;
    let here = Destination::new();
    let brought = here.fetch(&content, &[&near], &far).await.unwrap();
    here.assert_has_all(&content);
    let lacking = content.objects.keys().filter(|digest| !some.contains_key(digest));
    assert_eq!(source.asked(), lacking.copied().collect());
    assert_eq!(objects_from(&brought, "near"), some.len() as u64);
    let all: usize = near_node.requests().iter().map(Vec::len).sum();
    assert_eq!(all, content.objects.len(), "nothing is asked for twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_neighbours_share_the_work() {
    let content = Content::new();
    let (_, one) = node("one", Script::Slow(20), content.objects.clone()).await;
    let (_, two) = node("two", Script::Slow(20), content.objects.clone()).await;
    let (source, far) = node("source", Script::Honest, content.objects.clone()).await;
    let here = Destination::new();
    let brought = here.fetch(&content, &[&one, &two], &far).await.unwrap();
    here.assert_has_all(&content);
    assert!(objects_from(&brought, "one") > 100, "{brought:?}");
    assert!(objects_from(&brought, "two") > 100, "{brought:?}");
    assert_eq!(total(&brought), content.objects.len() as u64);
    assert!(source.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lie_is_refused_and_the_object_comes_from_elsewhere() {
    let content = Content::new();
    let lies = [
        Script::WrongBytes,
        Script::Unasked,
        Script::TooLarge,
        Script::Garbage,
        Script::UnknownEncoding,
        Script::ShortDigest,
        Script::Twice,
    ];
    for script in lies {
        let (liar_node, liar) = node("liar", script, content.objects.clone()).await;
        let (_, far) = node("source", Script::Honest, content.objects.clone()).await;
        let here = Destination::new();
        let brought = here.fetch(&content, &[&liar], &far).await.unwrap();
        here.assert_has_all(&content);
        // Sound objects beside the lie count, each once.
        assert_eq!(total(&brought), content.objects.len() as u64, "{script:?}");
        if !matches!(script, Script::Unasked | Script::Twice) {
            assert_eq!(objects_from(&brought, "liar"), 0, "{script:?}");
        }
        let requests = liar_node.requests().len();
        assert!(requests <= REQUESTS_AT_ONCE, "{script:?} was asked {requests} times");
    }
}

/// Method: a second, honest neighbour has everything too, so the source must not be needed either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_neighbour_costs_one_patience_in_all_levels_together() {
    let content = Content::new();
    for script in [Script::Silent, Script::Stalls] {
        let (dead_node, dead) = node("dead", script, content.objects.clone()).await;
        let (_, near) = node("near", Script::Slow(20), content.objects.clone()).await;
        let (source, far) = node("source", Script::Honest, content.objects.clone()).await;
        let here = Destination::new();
        let begun = Instant::now();
        let brought = here.fetch(&content, &[&dead, &near], &far).await.unwrap();
        let elapsed = begun.elapsed();
        here.assert_has_all(&content);
        let requests = dead_node.requests().len();
        // It may still be of use, so later levels ask it as well, but nothing waits for it.
        let most = REQUESTS_AT_ONCE * LEVELS;
        assert!((1..=most).contains(&requests), "{script:?}: {requests} requests");
        let limit = PATIENCE.neighbour * 7 / 4;
        assert!(elapsed < limit, "{script:?} cost {} ms", elapsed.as_millis());
        assert!(source.requests().is_empty(), "{script:?}: {brought:?}");
    }
}

/// Method: each message comes in good time for the next, but a batch would take longer than
/// [`LIMIT`].
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_neighbour_that_only_trickles_is_overtaken() {
    let content = Content::new();
    let (_, slow) = node("slow", Script::Trickles, content.objects.clone()).await;
    let (_, far) = node("source", Script::Honest, content.objects.clone()).await;
    let here = Destination::new();
    let begun = Instant::now();
    let brought = here.fetch(&content, &[&slow], &far).await.unwrap();
    let elapsed = begun.elapsed();
    here.assert_has_all(&content);
    // The first two levels are small enough for it to finish or to be cut; the third has the pages.
    assert!(elapsed < PATIENCE.neighbour * 4, "it cost {} ms", elapsed.as_millis());
    assert!(objects_from(&brought, "slow") > 0);
    assert!(objects_from(&brought, "source") >= content.pages.len() as u64 / 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_makes_all_neighbours_fail_the_source_sends_the_rest() {
    let content = Content::new();
    let scripts = [Script::Silent, Script::Fails, Script::Breaks, Script::Ends, Script::Chatters];
    for script in scripts {
        let (one_node, one) = node("one", script, content.objects.clone()).await;
        let (_, two) = node("two", Script::Fails, content.objects.clone()).await;
        let (_, far) = node("source", Script::Honest, content.objects.clone()).await;
        let here = Destination::new();
        let brought = here.fetch(&content, &[&one, &two], &far).await.unwrap();
        here.assert_has_all(&content);
        assert_eq!(total(&brought), content.objects.len() as u64, "{script:?}");
        assert!(objects_from(&brought, "one") <= (REQUESTS_AT_ONCE * LEVELS) as u64, "{script:?}");
        assert!(one_node.requests().len() <= REQUESTS_AT_ONCE * LEVELS, "{script:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_neighbour_that_dies_midway_keeps_what_it_brought() {
    let content = Content::new();
    let (_, near) = node("near", Script::HonestFor(300), content.objects.clone()).await;
    let (_, far) = node("source", Script::Honest, content.objects.clone()).await;
    let here = Destination::new();
    let brought = here.fetch(&content, &[&near], &far).await.unwrap();
    here.assert_has_all(&content);
    assert!(objects_from(&brought, "near") >= 100, "{brought:?}");
    assert_eq!(total(&brought), content.objects.len() as u64);
}

/// Method: a neighbour that lives on but lacks half, so that its workers must not wait for the
/// source's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_source_fails_the_error_counts_what_is_missing_and_the_rest_stays() {
    let content = Content::new();
    let some =
        content.only(|digest| *digest == content.root.1 || content.some().contains_key(digest));
    let scripts = [
        Script::Fails,
        Script::Silent,
        Script::Stalls,
        Script::Ends,
        Script::Breaks,
        Script::Chatters,
        Script::WrongBytes,
        Script::Garbage,
    ];
    for script in scripts {
        let (_, near) = node("near", Script::Honest, some.clone()).await;
        let (_, far) = node("source", script, content.objects.clone()).await;
        let here = Destination::new();
        let failed = here.fetch(&content, &[&near], &far).await.unwrap_err();
        let arrived = here.arrived(&content);
        let FetchError::SourceFailed { missing, reason } = failed else {
            panic!("{script:?}: {failed}");
        };
        let pages = content.pages.iter().filter(|page| !arrived.contains(*page)).count();
        assert_eq!(missing, pages, "{script:?}: {reason}");
        assert!(
            missing > 0
                && some
                    .keys()
                    .filter(|one| content.pages.contains(*one))
                    .all(|one| arrived.contains(one)),
            "{script:?}: the neighbour's part stays"
        );

        let (again, far) = node("source", Script::Honest, content.objects.clone()).await;
        here.fetch(&content, &[&near], &far).await.unwrap();
        here.assert_has_all(&content);
        assert!(arrived.is_disjoint(&again.asked().into_iter().collect()), "{script:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_fails_midway_without_neighbours_loses_nothing_that_came() {
    let content = Content::new();
    let (_, far) = node("source", Script::HonestFor(500), content.objects.clone()).await;
    let here = Destination::new();
    let failed = here.fetch(&content, &[], &far).await.unwrap_err();
    let arrived = here.arrived(&content);
    assert!(arrived.len() >= 100, "{} objects arrived", arrived.len());
    assert!(matches!(failed, FetchError::SourceFailed { missing, .. }
        if missing <= content.objects.len() - arrived.len() && missing >= 100));
    let (again, far) = node("source", Script::Honest, content.objects.clone()).await;
    let brought = here.fetch(&content, &[], &far).await.unwrap();
    here.assert_has_all(&content);
    assert_eq!(total(&brought), (content.objects.len() - arrived.len()) as u64);
    assert!(arrived.is_disjoint(&again.asked().into_iter().collect()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_has_is_named() {
    let content = Content::new();
    let lost = *content.pages.iter().max().unwrap();
    let (near_node, near) =
        node("near", Script::Honest, content.only(|digest| *digest != lost)).await;
    let (source, far) =
        node("source", Script::Honest, content.only(|digest| *digest != lost)).await;
    let here = Destination::new();
    let failed = here.fetch(&content, &[&near], &far).await.unwrap_err();
    assert!(matches!(failed, FetchError::Nowhere(digest) if digest == lost), "{failed}");
    assert!(near_node.asked().contains(&lost) && source.asked().contains(&lost));
    assert!(!here.arrived(&content).contains(&lost));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_fetch_leaves_a_store_that_the_next_one_goes_on_with() {
    let content = Content::new();
    let (_, far) = node("source", Script::Slow(30), content.objects.clone()).await;
    let here = Destination::new();
    for ms in [5, 45, 75, 105, 135, 165] {
        let work = here.fetch(&content, &[], &far);
        let _ = tokio::time::timeout(Duration::from_millis(ms), work).await;
        here.arrived(&content);
    }
    here.fetch(&content, &[], &far).await.unwrap();
    here.assert_has_all(&content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_neighbours_everything_comes_from_the_source_once() {
    let content = Content::new();
    let (source, far) = node("source", Script::Honest, content.objects.clone()).await;
    let here = Destination::new();
    let brought = here.fetch(&content, &[], &far).await.unwrap();
    here.assert_has_all(&content);
    assert_eq!(objects_from(&brought, "source"), content.objects.len() as u64);
    let asked: usize = source.requests().iter().map(Vec::len).sum();
    assert_eq!(asked, content.objects.len());
    assert!(here.fetch(&content, &[], &far).await.unwrap().is_empty());
    assert_eq!(source.requests().iter().map(Vec::len).sum::<usize>(), asked);
}

/// Method: one lacks half, one dies midway, one is slow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_source_neighbours_bring_what_the_others_do_not() {
    let content = Content::new();
    let (_, one) = node("one", Script::Honest, content.some()).await;
    let (_, two) = node("two", Script::HonestFor(300), content.objects.clone()).await;
    let (_, three) = node("three", Script::Slow(20), content.objects.clone()).await;
    let here = Destination::new();
    let brought = here.fetch(&content, &[&one, &two, &three], None).await.unwrap();
    here.assert_has_all(&content);
    assert_eq!(total(&brought), content.objects.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_source_what_the_neighbours_do_not_bring_is_nowhere() {
    let content = Content::new();
    let (_, honest) = node("honest", Script::Honest, content.some()).await;
    for script in [Script::Honest, Script::Silent, Script::Fails, Script::WrongBytes] {
        let (_, other) = node("other", script, content.some()).await;
        let here = Destination::new();
        let begun = Instant::now();
        let failed = here.fetch(&content, &[&honest, &other], None).await.unwrap_err();
        assert!(matches!(failed, FetchError::Nowhere(_)), "{script:?}: {failed}");
        assert!(begun.elapsed() < PATIENCE.neighbour * 2, "{script:?}: {:?}", begun.elapsed());
    }
    let failed = Destination::new().fetch(&content, &[], None).await.unwrap_err();
    assert!(matches!(failed, FetchError::Nowhere(_)), "{failed}");
}

/// Method: a file that holds the very bytes of a directory, so that one digest is of two kinds in
/// one level.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_with_the_bytes_of_a_directory_hides_no_files() {
    let mut sink = Objects::default();
    let files = tempfile::tempdir().unwrap();
    let directory = files.path().join("z");
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("inside"), "inside").unwrap();
    let inner = capture(&directory, &mut sink, &mut Unchanged::default());
    let inner: crate::content::object::Tree =
        crate::content::Source::decode(&sink, &inner.unwrap().tree).unwrap();
    std::fs::write(files.path().join("a"), &sink.0[&inner.root]).unwrap();
    let mut sink = Objects::default();
    let tree = capture(files.path(), &mut sink, &mut Unchanged::default());
    let root = (Kind::Tree, tree.unwrap().tree);
    let content = Content { root, objects: sink.0, pages: HashSet::new() };
    assert_eq!(content.objects.len(), 4, "tree, directory, directory and file, inside");
    let (_, far) = node("source", Script::Honest, content.objects.clone()).await;
    let here = Destination::new();
    here.fetch(&content, &[], &far).await.unwrap();
    here.assert_has_all(&content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_is_not_opened_to_a_node_that_does_not_say_a_proper_hello() {
    let limit = Duration::from_millis(300);
    let greet = |greeting| async move {
        let (script, objects, asked) = (Script::Honest, HashMap::new(), Mutex::default());
        let name = "near".to_owned();
        let node = Scripted { name, greeting, script, objects, asked, located: None, sends: None };
        serve(node).await.1
    };
    for greeting in [Greeting::Refuses, Greeting::SpeaksAnotherVersion] {
        let config = greet(greeting).await;
        let refused = Connection::open(&config, "near", LIMIT).await;
        assert!(matches!(refused, Err(PeerError::Unreachable { .. })), "{greeting:?}");
    }
    let config = greet(Greeting::Silent).await;
    let silent = Connection::open(&config, "near", limit).await;
    assert!(matches!(silent, Err(PeerError::Slow { .. })));
    let config = greet(Greeting::Welcomes).await;
    let other = Connection::open(&config, "other", LIMIT).await;
    assert!(matches!(other, Err(PeerError::Impostor { found, .. }) if found == "near"));
    let unknown = Connection::open(&config, "unknown", LIMIT).await;
    assert!(matches!(unknown, Err(PeerError::Unknown(_))));
    assert!(Connection::open(&config, "near", LIMIT).await.is_ok());
}

#[test]
fn the_newest_version_that_both_speak_is_chosen() {
    assert_eq!(Version::agree(1, 1), Some(1));
    assert_eq!(Version::agree(1, 9), Some(Version::NEWEST as u32));
    assert_eq!(Version::agree(2, 9), None);
    assert_eq!(Version::agree(0, 0), None);
}
