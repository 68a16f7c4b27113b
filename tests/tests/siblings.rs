//! What the snapshot of a sibling is worth: another user's container of the same image, with other
//! data, moves for the first time, once beside a neighbour that has nothing and once beside one
//! with the sibling's snapshot.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::Image;
use godwit_tests::workload::{self, Container, REDIS_PORT};
use godwit_tests::{Bed, BedOptions, Node, neighbours, pattern, redis};
use serde_json::Value;

/// Links of all nodes, in Mbit/s: slow enough to be what limits a transfer.
const LINK_MBIT: u32 = 200;

/// How long a server may take until it answers, its first start included.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// Port of the JVM's service.
const LEDGER_PORT: u16 = 8080;

/// Data of each user, in MiB.
const DATA_MIB: usize = 8;

static BED: LazyLock<Bed> = LazyLock::new(|| {
    Bed::start(&BedOptions::nodes(3).rate_mbit(LINK_MBIT).sibling_memory())
        .expect("the test nodes start")
});

fn source() -> &'static Node {
    BED.node(0)
}

fn destination() -> &'static Node {
    BED.node(1)
}

fn neighbour() -> &'static Node {
    BED.node(2)
}

/// A service of which every user has a container.
trait Service {
    /// Short, as it is part of names.
    const NAME: &'static str;
    const IMAGE: Image;

    /// What the user's container runs.
    fn command(user: &str) -> Vec<String>;
    /// Has it hold the user's data, and answers once it does.
    fn fill(at: &Node, name: &str, address: Ipv4Addr, user: &str) -> Result<()>;
    /// All of its state, in any form that tells two states apart. Errors: it does not answer.
    fn state(at: &Node, name: &str, address: Ipv4Addr) -> Result<String>;
    /// Changes its state.
    fn change(at: &Node, name: &str, address: Ipv4Addr) -> Result<()>;
}

/// Words parted by single blanks.
fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

struct Postgresql;

impl Postgresql {
    fn sql(at: &Node, name: &str, sql: &str) -> Result<String> {
        let client = ["psql", "-h", "/run/postgresql", "-U", "postgres", "-v", "ON_ERROR_STOP=1"];
        let exec = ["ctr", "tasks", "exec", "--exec-id", "psql", name];
        at.ok(&[&exec[..], &client[..], &["-qAtc", sql]].concat())
    }
}

impl Service for Postgresql {
    const NAME: &'static str = "pg";
    const IMAGE: Image = Image::Postgresql;

    fn command(_user: &str) -> Vec<String> {
        words("postgresql.sh -c listen_addresses=*")
    }

    fn fill(at: &Node, name: &str, _: Ipv4Addr, user: &str) -> Result<()> {
        wait_until("PostgreSQL answers", ANSWER_MAX, || {
            Ok(Self::sql(at, name, "select 1").is_ok())
        })?;
        // 128 bytes of text each.
        let rows = DATA_MIB * 8192;
        let text = |part: u8| format!("md5('{user} {part}' || i)");
        let text = (0..4).map(text).collect::<Vec<_>>().join(" || ");
        Self::sql(
            at,
            name,
            &format!(
                "create table ledger as select i as id, {text} as entry from generate_series(1, {rows}) as i;
                 alter table ledger add primary key (id)"
            ),
        )
        .map(drop)
    }

    fn state(at: &Node, name: &str, _: Ipv4Addr) -> Result<String> {
        let started = "pg_postmaster_start_time()";
        let all = "select count(*), md5(string_agg(entry, '' order by id))";
        Self::sql(at, name, &format!("{all}, {started} from ledger"))
    }

    fn change(at: &Node, name: &str, _: Ipv4Addr) -> Result<()> {
        Self::sql(at, name, "insert into ledger select max(id) + 1, 'more' from ledger").map(drop)
    }
}

struct Jvm;

impl Jvm {
    fn ask(address: Ipv4Addr, path: &str) -> Result<String> {
        BED.as_client(|| {
            let address = SocketAddr::from((address, LEDGER_PORT));
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let (head, body) = answer.split_once("\r\n\r\n").context("an answer without an end")?;
            ensure!(head.contains(" 200 "), "{answer}");
            Ok(body.to_owned())
        })
    }
}

impl Service for Jvm {
    const NAME: &'static str = "jvm";
    const IMAGE: Image = Image::Jvm;

    fn command(user: &str) -> Vec<String> {
        words(&format!("java -Xmx64m -cp /app Ledger {LEDGER_PORT} {user} {DATA_MIB}"))
    }

    fn fill(_: &Node, _: &str, address: Ipv4Addr, _: &str) -> Result<()> {
        wait_until("the JVM answers", ANSWER_MAX, || Ok(Self::ask(address, "/state").is_ok()))
    }

    fn state(_: &Node, _: &str, address: Ipv4Addr) -> Result<String> {
        Self::ask(address, "/state")
    }

    fn change(_: &Node, _: &str, address: Ipv4Addr) -> Result<()> {
        Self::ask(address, "/add").map(drop)
    }
}

struct Redis;

impl Redis {
    fn client(address: Ipv4Addr) -> Result<redis::Client> {
        let address = SocketAddr::from((address, REDIS_PORT));
        Ok(redis::Client::connect(address, Duration::from_secs(5))?)
    }
}

impl Service for Redis {
    const NAME: &'static str = "redis";
    const IMAGE: Image = Image::Redis;

    fn command(_: &str) -> Vec<String> {
        words("redis-server --protected-mode no --save  --dir /data --enable-debug-command yes")
    }

    fn fill(_: &Node, _: &str, address: Ipv4Addr, user: &str) -> Result<()> {
        BED.as_client(|| {
            wait_until("redis answers", ANSWER_MAX, || Ok(Self::client(address).is_ok()))?;
            let mut client = Self::client(address)?;
            let mut value = vec![0; 1024];
            let seed = user.bytes().fold(0, |seed, byte| seed * 256 + u64::from(byte));
            for number in 0..DATA_MIB as u64 * 1024 {
                pattern::fill(number, seed, &mut value);
                client.set(&format!("key:{number}"), &value)?;
            }
            Ok(())
        })
    }

    fn state(_: &Node, _: &str, address: Ipv4Addr) -> Result<String> {
        BED.as_client(|| {
            let mut client = Self::client(address)?;
            Ok(format!("{:?}", client.command(&[b"DEBUG", b"DIGEST"])?))
        })
    }

    fn change(_: &Node, _: &str, address: Ipv4Addr) -> Result<()> {
        BED.as_client(|| Ok(Self::client(address)?.set("more", b"more")?))
    }
}

/// Starts a user's container and has it hold the user's data.
fn start<S: Service>(at: &Node, address: Ipv4Addr, user: &str) -> Result<String> {
    let name = format!("{}-{user}", S::NAME);
    at.ok(&["godwit", "volume", "create", &name])?;
    let command = S::command(user);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    Container::new(&name, S::IMAGE)
        .volume(&name, "/data", "rw")
        .network(S::NAME)
        .annotation("godwit.io/user", user)
        .command(&command)
        .start(at)?;
    S::fill(at, &name, address, user)?;
    Ok(name)
}

fn remove(at: &Node, name: &str) -> Result<()> {
    at.ok(&["ctr", "tasks", "rm", "-f", name])?;
    at.ok(&["ctr", "containers", "rm", name])?;
    at.ok(&["godwit", "volume", "rm", name]).map(drop)
}

/// Moves a second user's new container to a destination that has nothing. Returns the report.
fn move_second<S: Service>(addresses: &[Ipv4Addr], user: &str) -> Result<Value> {
    // Source and destination know nothing of what was here before.
    [source(), destination()].into_iter().try_for_each(neighbours::forget)?;
    let name = start::<S>(source(), addresses[0], user)?;
    let before = S::state(source(), &name, addresses[0])?;
    let report = workload::migrated(destination(), &name, source(), destination(), &[])?;
    let after = S::state(destination(), &name, addresses[1])?;
    ensure!(after == before, "before: {before}\nafter: {after}");
    S::change(destination(), &name, addresses[1])?;
    let changed = S::state(destination(), &name, addresses[1])?;
    ensure!(changed != after, "it no longer takes changes: {after}");
    remove(destination(), &name)?;
    source().ok(&["godwit", "volume", "rm", &name])?;
    Ok(report)
}

/// Bytes of memory from a node before the stop, uncompressed.
fn memory_bytes(report: &Value, node: &Node) -> Result<u64> {
    let subjects = report["subjects"].as_array().context("subjects")?;
    let is_memory =
        |one: &&Value| one["subject"].as_str().is_some_and(|s| s.starts_with("memory|"));
    let memory = subjects.iter().find(is_memory).context("no memory in the report")?;
    Ok(memory["raw_bytes_by_node"][node.name()].as_u64().unwrap_or(0))
}

/// Bytes of memory from the source: before the stop, and everything after it.
fn source_bytes(report: &Value) -> Result<u64> {
    let stop = report["stop_and_copy_bytes"].as_u64().context("stop_and_copy_bytes")?;
    Ok(memory_bytes(report, source())? + stop)
}

/// The source's bytes of memory with the sibling's snapshot at the neighbour, as a share of those
/// without.
fn share_from_source<S: Service>(first: u8) -> Result<f64> {
    BED.import(S::IMAGE, "godwit")?;
    let addresses = workload::networks(&BED, S::NAME, first)?;
    neighbours::forget(neighbour())?;
    let sibling = start::<S>(neighbour(), addresses[2], "one")?;
    let without = move_second::<S>(&addresses, "two")?;
    ensure!(memory_bytes(&without, neighbour())? == 0, "a neighbour that has nothing: {without}");
    neighbour().ok(&["godwit", "snapshot", "create", &sibling])?;
    let with = move_second::<S>(&addresses, "two")?;
    let brought = memory_bytes(&with, neighbour())?;
    ensure!(brought > 0, "the neighbour brought nothing: {with}");
    remove(neighbour(), &sibling)?;
    let (alone, beside) = (source_bytes(&without)?, source_bytes(&with)?);
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    let share = beside as f64 / alone as f64;
    println!(
        "{}: bytes of memory from the source {alone} without, {beside} ({:.0}%) with the sibling's snapshot at a \
         neighbour, which brought {brought}",
        S::NAME,
        share * 100.0
    );
    Ok(share)
}

#[test]
fn a_second_users_postgresql_takes_less_from_its_source_where_a_siblings_snapshot_is() -> Result<()>
{
    let share = share_from_source::<Postgresql>(0)?;
    ensure!(share <= 0.85, "{share:.2} of the bytes still come from the source");
    Ok(())
}

#[test]
fn a_second_users_jvm_takes_less_from_its_source_where_a_siblings_snapshot_is() -> Result<()> {
    let share = share_from_source::<Jvm>(10)?;
    ensure!(share <= 0.85, "{share:.2} of the bytes still come from the source");
    Ok(())
}

/// Most of what redis holds is its user's data: little is alike, and what that is worth is printed.
#[test]
fn a_second_users_redis_arrives_whole_beside_a_siblings_snapshot() -> Result<()> {
    let share = share_from_source::<Redis>(20)?;
    ensure!(share < 1.05, "a sibling's snapshot makes the source send more: {share:.2}");
    Ok(())
}
