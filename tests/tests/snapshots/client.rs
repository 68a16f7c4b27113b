//! A snapshotter as containerd sees it: its calls one by one, and its mounts mounted.
//!
//! Keys and names of each check begin with the check's own name, so that checks do not meet.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_client::services::v1::snapshots as api;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, Request, Response, Status};
use containerd_client::types::Mount;
use nix::mount::{MsFlags, mount, umount};
use tokio::runtime::Runtime;

/// How long one call may take.
const CALL_MAX: Duration = Duration::from_secs(30);

/// A kind of snapshotter: what makes the factory.
#[derive(Debug)]
pub(crate) struct Subject {
    /// Where it is served.
    pub(crate) socket: &'static str,
    /// containerd's name for it.
    pub(crate) snapshotter: &'static str,
    /// Whether containerd keeps names of its own over it, and collects what nothing refers to.
    pub(crate) through_containerd: bool,
    /// Its directories, one for each snapshot.
    pub(crate) trees: &'static str,
}

/// One check's view of a snapshotter.
pub(crate) struct Snapshotter {
    pub(crate) subject: &'static Subject,
    /// containerd's lease that holds what is made.
    pub(crate) lease: Option<&'static str>,
    runtime: Runtime,
    client: SnapshotsClient<Channel>,
    prefix: String,
}

pub(crate) type Labels<'a> = &'a [(&'a str, &'a str)];

/// What is known of a snapshot, without the check's prefix.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Info {
    pub(crate) name: String,
    pub(crate) parent: String,
    pub(crate) kind: api::Kind,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) created: Duration,
    pub(crate) updated: Duration,
}

type Answer<T> = Result<T, Status>;

impl Snapshotter {
    pub(crate) fn connect(subject: &'static Subject, check: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime.block_on(containerd_client::connect(subject.socket))?;
        let client = SnapshotsClient::new(channel);
        let prefix = format!("{check}/");
        Ok(Self { subject, lease: Some("conformance"), runtime, client, prefix })
    }

    /// The name under which containerd knows it.
    pub(crate) fn whole(&self, name: &str) -> String {
        if name.is_empty() { String::new() } else { format!("{}{name}", self.prefix) }
    }

    fn short(&self, name: String) -> String {
        name.strip_prefix(&self.prefix).map_or(name.clone(), str::to_owned)
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(CALL_MAX);
        let words = [("containerd-namespace", Some("default")), ("containerd-lease", self.lease)];
        for (key, word) in words {
            if let Some(word) = word {
                request.metadata_mut().insert(key, word.parse().expect("a word of ours"));
            }
        }
        request
    }

    fn call<M, T>(
        &self,
        message: M,
        call: impl AsyncFnOnce(&mut SnapshotsClient<Channel>, Request<M>) -> Answer<Response<T>>,
    ) -> Answer<T> {
        let request = self.request(message);
        self.runtime
            .block_on(async { call(&mut self.client.clone(), request).await })
            .map(Response::into_inner)
    }

    fn name(&self) -> String {
        self.subject.snapshotter.to_owned()
    }

    fn info(&self, info: Option<api::Info>) -> Info {
        let info = info.expect("an answer carries what it is about");
        let kind = info.kind();
        let since = |time: Option<prost_types::Timestamp>| {
            let time = time.expect("a snapshot has its times");
            let (seconds, nanos) = (u64::try_from(time.seconds), u32::try_from(time.nanos));
            Duration::new(seconds.expect("after 1970"), nanos.expect("below a second"))
        };
        Info {
            name: self.short(info.name),
            parent: self.short(info.parent),
            kind,
            labels: info.labels.into_iter().collect(),
            created: since(info.created_at),
            updated: since(info.updated_at),
        }
    }

    pub(crate) fn prepare(&self, key: &str, parent: &str) -> Answer<Vec<Mount>> {
        self.prepare_labelled(key, parent, &[])
    }

    pub(crate) fn prepare_labelled(
        &self,
        key: &str,
        parent: &str,
        labels: Labels<'_>,
    ) -> Answer<Vec<Mount>> {
        let message = self.prepare_message(key, parent, labels);
        Ok(self.call(message, async |client, asked| client.prepare(asked).await)?.mounts)
    }

    fn prepare_message(
        &self,
        key: &str,
        parent: &str,
        labels: Labels<'_>,
    ) -> api::PrepareSnapshotRequest {
        let (key, parent) = (self.whole(key), self.whole(parent));
        api::PrepareSnapshotRequest { snapshotter: self.name(), key, parent, labels: owned(labels) }
    }

    /// Prepares one key several times at once, and says how each attempt went.
    pub(crate) fn prepare_at_once(&self, key: &str, parent: &str, times: usize) -> Vec<Answer<()>> {
        self.runtime.block_on(async {
            let mut attempts = tokio::task::JoinSet::new();
            for _ in 0..times {
                let request = self.request(self.prepare_message(key, parent, &[]));
                let mut client = self.client.clone();
                attempts.spawn(async move { client.prepare(request).await.map(drop) });
            }
            attempts.join_all().await
        })
    }

    pub(crate) fn view(&self, key: &str, parent: &str) -> Answer<Vec<Mount>> {
        self.view_labelled(key, parent, &[])
    }

    pub(crate) fn view_labelled(
        &self,
        key: &str,
        parent: &str,
        labels: Labels<'_>,
    ) -> Answer<Vec<Mount>> {
        let (key, parent) = (self.whole(key), self.whole(parent));
        let labels = owned(labels);
        let message = api::ViewSnapshotRequest { snapshotter: self.name(), key, parent, labels };
        Ok(self.call(message, async |client, asked| client.view(asked).await)?.mounts)
    }

    pub(crate) fn mounts(&self, key: &str) -> Answer<Vec<Mount>> {
        let message = api::MountsRequest { snapshotter: self.name(), key: self.whole(key) };
        Ok(self.call(message, async |client, asked| client.mounts(asked).await)?.mounts)
    }

    pub(crate) fn commit(&self, name: &str, key: &str) -> Answer<()> {
        self.commit_labelled(name, key, &[])
    }

    pub(crate) fn commit_labelled(&self, name: &str, key: &str, labels: Labels<'_>) -> Answer<()> {
        let message = api::CommitSnapshotRequest {
            snapshotter: self.name(),
            name: self.whole(name),
            key: self.whole(key),
            labels: owned(labels),
        };
        self.call(message, async |client, asked| client.commit(asked).await)
    }

    pub(crate) fn remove(&self, key: &str) -> Answer<()> {
        let message = api::RemoveSnapshotRequest { snapshotter: self.name(), key: self.whole(key) };
        self.call(message, async |client, asked| client.remove(asked).await)
    }

    pub(crate) fn stat(&self, key: &str) -> Answer<Info> {
        let message = api::StatSnapshotRequest { snapshotter: self.name(), key: self.whole(key) };
        let answer = self.call(message, async |client, asked| client.stat(asked).await)?;
        Ok(self.info(answer.info))
    }

    /// Gives `key` these labels, as far as `fields` says; all of them without fields.
    pub(crate) fn update(&self, key: &str, labels: Labels<'_>, fields: &[&str]) -> Answer<Info> {
        // What cannot be changed is wrong in the message, and must be ignored.
        let info = api::Info {
            name: self.whole(key),
            parent: "none".to_owned(),
            kind: api::Kind::View.into(),
            labels: owned(labels),
            ..Default::default()
        };
        let paths: Vec<_> = fields.iter().map(|field| (*field).to_owned()).collect();
        let message = api::UpdateSnapshotRequest {
            snapshotter: self.name(),
            info: Some(info),
            update_mask: (!paths.is_empty()).then_some(prost_types::FieldMask { paths }),
        };
        let answer = self.call(message, async |client, asked| client.update(asked).await)?;
        Ok(self.info(answer.info))
    }

    /// Bytes and inodes.
    pub(crate) fn usage(&self, key: &str) -> Answer<(i64, i64)> {
        let message = api::UsageRequest { snapshotter: self.name(), key: self.whole(key) };
        let usage = self.call(message, async |client, asked| client.usage(asked).await)?;
        Ok((usage.size, usage.inodes))
    }

    /// Snapshots that the filters match, by name.
    pub(crate) fn list(&self, filters: &[&str]) -> Answer<BTreeMap<String, Info>> {
        let mut infos = BTreeMap::new();
        self.walk(filters, |some| {
            infos.extend(some.into_iter().map(|info| (info.name.clone(), info)));
            Ok(())
        })?;
        Ok(infos)
    }

    /// Lists, and calls `each` with what a message brings before the next one is read.
    pub(crate) fn walk(
        &self,
        filters: &[&str],
        mut each: impl FnMut(Vec<Info>) -> Answer<()>,
    ) -> Answer<()> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let message = api::ListSnapshotsRequest { snapshotter: self.name(), filters };
        let mut stream = self.call(message, async |client, asked| client.list(asked).await)?;
        while let Some(some) = self.runtime.block_on(stream.message())? {
            each(some.info.into_iter().map(|info| self.info(Some(info))).collect())?;
        }
        Ok(())
    }

    /// Has the space of what was removed given back: by the call for it, or by containerd's
    /// collection.
    pub(crate) fn free(&self) -> Result<()> {
        if self.subject.through_containerd {
            // It only looks at snapshotters from which something was removed.
            self.view("removed", "")?;
            self.remove("removed")?;
            return command(&["ctr", "content", "prune", "references"]).map(drop);
        }
        let message = api::CleanupRequest { snapshotter: self.name() };
        Ok(self.call(message, async |client, asked| client.cleanup(asked).await)?)
    }

    /// How many directories of snapshots there are, after [`Self::free`].
    pub(crate) fn directories(&self) -> Result<usize> {
        self.free()?;
        let names = fs::read_dir(self.subject.trees)?.map(|entry| Ok(entry?.file_name()));
        let names = names.collect::<Result<Vec<_>>>()?;
        Ok(names.iter().filter(|name| !name.as_encoded_bytes().starts_with(b".")).count())
    }

    /// Makes a committed snapshot `name` over `parent`, with what `fill` does in it.
    pub(crate) fn layer(
        &self,
        name: &str,
        parent: &str,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let key = format!("fill {name}");
        mounted(&self.prepare(&key, parent)?, fill)?;
        Ok(self.commit(name, &key)?)
    }

    /// Removes what the check has made, children first.
    pub(crate) fn remove_all(&self) -> Result<()> {
        loop {
            let mut left: Vec<String> = self.list(&[])?.into_keys().collect();
            left.retain(|name| !name.contains('/'));
            if left.is_empty() {
                return Ok(());
            }
            let before = left.len();
            left.retain(|name| self.remove(name).is_err());
            ensure!(left.len() < before, "cannot be removed: {left:?}");
        }
    }
}

fn owned(labels: Labels<'_>) -> HashMap<String, String> {
    labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Checks that a call failed, and with which code.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(answer: Answer<T>, code: Code) {
    refused_with(answer, &[code]);
}

/// Checks that a call failed, and with one of these codes: where two things are wrong, either may
/// be said.
#[track_caller]
pub(crate) fn refused_with<T: std::fmt::Debug>(answer: Answer<T>, codes: &[Code]) {
    let status = answer.expect_err("this is to be refused");
    assert!(codes.contains(&status.code()), "{codes:?}, not {status:?}");
}

/// Runs a command among the mounts of this thread.
pub(crate) fn command(words: &[&str]) -> Result<String> {
    let [program, arguments @ ..] = words else { anyhow::bail!("no command") };
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("run {words:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{words:?}: {text}{said}");
    Ok(text)
}

/// Unmounted when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = umount(&self.0) {
            eprintln!("{} stays mounted: {error}", self.0.display());
        }
    }
}

/// Mounts what a snapshotter says, does `work` there, and unmounts it.
pub(crate) fn mounted<T>(mounts: &[Mount], work: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let target = PathBuf::from(format!("/mnt/conformance-{number}"));
    fs::create_dir_all(&target)?;
    let [one] = mounts else { anyhow::bail!("expected one mount: {mounts:?}") };
    mount_at(one, &target).with_context(|| format!("mount {one:?}"))?;
    let guard = Mounted(target.clone());
    let result = work(&target);
    drop(guard);
    fs::remove_dir(&target)?;
    result
}

/// As mount(8) and containerd do it.
fn mount_at(one: &Mount, target: &Path) -> Result<()> {
    let none = None::<&str>;
    if one.r#type == "bind" {
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(one.source.as_str()), target, none, bind, none)?;
        if one.options.iter().any(|option| option == "ro") {
            let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(none, target, none, read_only, none)?;
        }
        return Ok(());
    }
    // The kernel takes one page of options, which the paths of a deep chain exceed: they are made
    // relative. The thread has a working directory of its own.
    let mut options = one.options.clone();
    for option in &mut options {
        let Some(lower) = option.strip_prefix("lowerdir=") else { continue };
        let first = Path::new(lower.split(':').next().unwrap_or_default());
        let common = first.ancestors().nth(2).context("a short path")?;
        std::env::set_current_dir(common)?;
        *option = option.replace(&format!("{}/", common.display()), "");
    }
    let (kind, data) = (one.r#type.as_str(), options.join(","));
    Ok(mount(Some(one.source.as_str()), target, Some(kind), MsFlags::empty(), Some(data.as_str()))?)
}
