//! What must be alike and what must arrive: the values in redis and the files of its volumes.
//!
//! All bytes follow from numbers, nothing from time or chance: the values ([`Ledger`]), the order
//! of the commands and so the append-only file, the read-only files and their times, and with them
//! the digest that the read-only volume is named by. So both arms start from the same digests.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::load::{Ledger, key_name};
use godwit_tests::pattern;
use godwit_tests::redis::{Client, Reply};
use sha2::{Digest, Sha256};

/// Bytes of a value.
pub(crate) const VALUE_BYTES: usize = 8 << 10;
/// Values per MiB.
const VALUES_PER_MIB: u32 = (1 << 20) / 8192;
/// Bytes of a file of the read-only volume.
const FILE_MIB: u32 = 4;
/// Tells the bytes of read-only files from those of values.
const FILE_SEQUENCE: u64 = 0x66_69_6c_65;
/// Deadline of an answer while nothing moves.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Steps of this many keys visit all of them before any comes twice: it is a prime, so it shares no
/// factor with a number of keys that it does not divide.
const STRIDE: usize = 7919;

/// How many keys hold `mib` of values.
pub(crate) fn keys(mib: u32) -> usize {
    usize::try_from(mib * VALUES_PER_MIB).unwrap_or(usize::MAX)
}

/// Waits until redis answers. Errors: not within `patience`.
pub(crate) fn wait_for_answer(address: SocketAddr, patience: Duration) -> Result<()> {
    let answers = || Client::connect(address, Duration::from_secs(1))?.ping();
    wait_until("redis answers", patience, || Ok(answers().is_ok()))
}

/// Gives every key a value. Call it where `address` can be reached.
pub(crate) fn fill(address: SocketAddr, ledger: &mut Ledger, keys: usize) -> Result<()> {
    let mut client = Client::connect(address, ANSWER_TIMEOUT)?;
    (0..keys).try_for_each(|index| ledger.write(&mut client, index))?;
    settle(&mut client)
}

/// Gives `count` of the keys, spread over all of them, another value.
pub(crate) fn change(
    address: SocketAddr,
    ledger: &mut Ledger,
    keys: usize,
    count: usize,
) -> Result<()> {
    let mut client = Client::connect(address, ANSWER_TIMEOUT)?;
    (0..count).try_for_each(|step| ledger.write(&mut client, step * STRIDE % keys))?;
    settle(&mut client)
}

/// Waits until everything acknowledged is in the append-only file.
fn settle(client: &mut Client) -> Result<()> {
    let reply = client.command(&[b"WAITAOF", b"1", b"0", b"20000"])?;
    let synced = Reply::Array(vec![Reply::Integer(1), Reply::Integer(0)]);
    ensure!(reply == synced, "redis does not write its append-only file: {reply:?}");
    Ok(())
}

/// SHA-256 of all keys and values, in the order of the keys' numbers.
pub(crate) fn digest_of_data(address: SocketAddr, keys: usize) -> Result<String> {
    let mut client = Client::connect(address, ANSWER_TIMEOUT)?;
    let mut hash = Sha256::new();
    for index in 0..keys {
        let key = key_name(index);
        let value = client.get(&key)?.with_context(|| format!("{key} has no value"))?;
        hash.update((key.len() as u64).to_le_bytes());
        hash.update(key);
        hash.update((value.len() as u64).to_le_bytes());
        hash.update(value);
    }
    Ok(hex(&hash.finalize()))
}

/// Reads every key; what is wrong, in one line, or nothing.
pub(crate) fn check(address: SocketAddr, ledger: &Ledger, keys: usize) -> Result<Option<String>> {
    let verdict = ledger.verify(address)?;
    if verdict.values != keys as u64 {
        return Ok(Some(format!("{} of {keys} keys have a value", verdict.values)));
    }
    let first = verdict.wrong.first();
    Ok(first.map(|first| format!("{} values are wrong, one of them {first}", verdict.wrong.len())))
}

/// Has redis forget everything and read its append-only file again.
pub(crate) fn reload(address: SocketAddr) -> Result<()> {
    let mut client = Client::connect(address, ANSWER_TIMEOUT)?;
    settle(&mut client)?;
    client.command(&[b"DEBUG", b"LOADAOF"])?;
    Ok(())
}

/// Makes the directory that becomes the read-only volume.
pub(crate) fn make_read_only(directory: &Path, mib: u32) -> Result<()> {
    fs::create_dir_all(directory)?;
    let (mut left_mib, mut number) = (mib, 0);
    while left_mib > 0 {
        let mib = left_mib.min(FILE_MIB);
        let mut bytes = vec![0; usize::try_from(mib)? << 20];
        pattern::fill(number, FILE_SEQUENCE, &mut bytes);
        let path = directory.join(format!("part-{number:03}"));
        fs::write(&path, &bytes)?;
        date(&path)?;
        (left_mib, number) = (left_mib - mib, number + 1);
    }
    date(directory)
}

/// Sets the time of a file that the digest of a volume covers.
fn date(path: &Path) -> Result<()> {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    File::open(path)?.set_modified(time).with_context(|| format!("date {}", path.display()))
}

/// Every file below a directory, with its length and the SHA-256 of its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Files(BTreeMap<PathBuf, (u64, String)>);

impl Files {
    /// Reads all files.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        Self::read_up_to(directory, None)
    }

    /// Whether a directory has the same files, none shorter and each beginning with the same bytes.
    pub(crate) fn have_grown_to(&self, directory: &Path) -> Result<bool> {
        Ok(Self::read_up_to(directory, Some(self))? == *self)
    }

    /// SHA-256 over paths, lengths and contents.
    pub(crate) fn digest(&self) -> String {
        let mut text = String::new();
        for (path, (length, digest)) in &self.0 {
            let _ = writeln!(text, "{digest} {length} {}", path.display());
        }
        hex(&Sha256::digest(text))
    }

    fn read_up_to(directory: &Path, known: Option<&Self>) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut directories = vec![directory.to_owned()];
        while let Some(next) = directories.pop() {
            let entries =
                fs::read_dir(&next).with_context(|| format!("list {}", next.display()))?;
            for entry in entries {
                let path = entry?.path();
                if path.is_dir() {
                    directories.push(path);
                    continue;
                }
                let name = path.strip_prefix(directory)?.to_owned();
                let limit = known.and_then(|known| known.0.get(&name)).map(|(length, _)| *length);
                let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
                files.insert(name, hash(file.take(limit.unwrap_or(u64::MAX)))?);
            }
        }
        Ok(Self(files))
    }
}

fn hash(mut input: impl Read) -> io::Result<(u64, String)> {
    let (mut hash, mut length, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        let read = input.read(&mut buffer)?;
        if read == 0 {
            return Ok((length, hex(&hash.finalize())));
        }
        hash.update(&buffer[..read]);
        length += read as u64;
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::DATA_MIB;

    #[test]
    fn the_keys_that_change_are_different_ones() {
        for keys in [keys(1), keys(DATA_MIB), 1000] {
            let changed: HashSet<usize> = (0..keys).map(|step| step * STRIDE % keys).collect();
            assert_eq!(changed.len(), keys);
        }
    }

    #[test]
    fn files_may_grow_but_not_shrink_change_or_multiply() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/log");
        fs::create_dir(path.parent().unwrap()).unwrap();
        fs::write(&path, "abc").unwrap();
        let before = Files::read(dir.path()).unwrap();
        for (text, grown) in [("abc", true), ("abcdef", true), ("ab", false), ("abX", false)] {
            fs::write(&path, text).unwrap();
            assert_eq!(before.have_grown_to(dir.path()).unwrap(), grown, "{text}");
        }
        fs::write(&path, "abc").unwrap();
        assert_eq!(Files::read(dir.path()).unwrap().digest(), before.digest());
        fs::write(dir.path().join("more"), "").unwrap();
        assert!(!before.have_grown_to(dir.path()).unwrap());
    }

    #[test]
    fn a_read_only_volume_is_the_same_each_time() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&one, &other] {
            make_read_only(&dir.path().join("v"), 5).unwrap();
        }
        let read = |dir: &tempfile::TempDir| Files::read(dir.path()).unwrap();
        assert_eq!(read(&one), read(&other));
        let modified =
            |dir: &tempfile::TempDir| fs::metadata(dir.path().join("v")).unwrap().modified();
        assert_eq!(modified(&one).unwrap(), modified(&other).unwrap());
    }
}
