//! Logs of CRIU that outlive their attempt, since errors name them: the last dump and the last
//! restore of each container. Their number and their age are bounded.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Logs that are kept on a node.
const LOGS_MAX: usize = 100;
/// How long one is kept.
const AGE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Copies `log` into `directory` as `name`, and removes what is beyond the bounds. Returns the
/// path of the copy.
///
/// Errors: I/O of the copy.
pub(crate) fn keep(log: &Path, directory: &Path, name: &str) -> io::Result<PathBuf> {
    let kept = directory.join(name);
    fs::create_dir_all(directory)?;
    fs::copy(log, &kept)?;
    prune(directory, SystemTime::now());
    Ok(kept)
}

/// Best effort: another shim may remove the same, and an operator may keep other files there.
fn prune(directory: &Path, now: SystemTime) {
    let log = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        let is_ours = entry.file_name().as_encoded_bytes().ends_with(b".log");
        let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
        is_ours.then_some((metadata.modified().ok()?, entry.path()))
    };
    let mut logs: Vec<_> = fs::read_dir(directory).into_iter().flatten().filter_map(log).collect();
    logs.sort_unstable_by(|one, other| other.cmp(one));
    for (place, (modified, path)) in logs.iter().enumerate() {
        let age = now.duration_since(*modified).unwrap_or_default();
        if place >= LOGS_MAX || age > AGE_MAX {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_logs_stay_and_other_files_too() {
        let dir = tempfile::tempdir().unwrap();
        let (log, kept) = (dir.path().join("dump.log"), dir.path().join("kept"));
        fs::write(&log, "why").unwrap();
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("notes"), "").unwrap();
        let now = SystemTime::now();
        for number in (0_u64..).take(LOGS_MAX + 5) {
            let path = kept.join(format!("ns-{number}.dump.log"));
            let file = fs::File::create(path).unwrap();
            file.set_modified(now - Duration::from_secs(number)).unwrap();
        }
        let old = fs::File::create(kept.join("ns-old.dump.log")).unwrap();
        old.set_modified(now - AGE_MAX - Duration::from_secs(1)).unwrap();
        let at = keep(&log, &kept, "ns-new.dump.log").unwrap();
        assert_eq!(fs::read_to_string(at).unwrap(), "why");
        let names: Vec<_> =
            fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), LOGS_MAX + 1, "{names:?}");
        for (name, stays) in [
            ("notes", true),
            ("ns-0.dump.log", true),
            ("ns-99.dump.log", false),
            ("ns-old.dump.log", false),
        ] {
            assert_eq!(names.iter().any(|one| one == name), stays, "{name}");
        }
        prune(&kept, now + AGE_MAX * 2);
        assert_eq!(fs::read_dir(&kept).unwrap().count(), 1);
    }
}
