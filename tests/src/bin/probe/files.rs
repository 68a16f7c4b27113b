//! Files in unusual states.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::report;

/// Alignment of memory that direct writes come from.
const ALIGNMENT: usize = 4096;
/// Bytes of a direct write.
const WRITE_BYTES: usize = 3 << 20;

/// Overwrites the file FILE as a whole by direct writes, one system call each, and reads it after
/// each.
///
/// The line is `writing N` during the Nth write, and `written N` when the file was read and has it.
pub(super) fn direct_writes(arguments: &[String]) -> io::Result<()> {
    let [path] = arguments else { return Err(usage("FILE")) };
    let mut options = OpenOptions::new();
    let file =
        options.write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT).open(path)?;
    let mut memory = vec![0; WRITE_BYTES + ALIGNMENT];
    let begin = memory.as_ptr().align_offset(ALIGNMENT);
    let bytes = &mut memory[begin..begin + WRITE_BYTES];
    for number in 1_u64.. {
        bytes.fill(number.to_le_bytes()[0]);
        report(&format!("writing {number}"))?;
        file.write_all_at(bytes, 0)?;
        let mut found = Vec::new();
        File::open(path)?.read_to_end(&mut found)?;
        if let Some(at) = found.iter().zip(&*bytes).position(|(found, wrote)| found != wrote) {
            let text = format!("write {number} is lost at offset {at}: {} is there", found[at]);
            return Err(io::Error::other(text));
        }
        report(&format!("written {number}"))?;
        thread::sleep(Duration::from_millis(300));
    }
    Ok(())
}

/// Holds a file open in each DIRECTORY whose name it removed while another one is left.
///
/// The line is `linked N`: N times it wrote through every descriptor and read the same by the other
/// name.
pub(super) fn removed_names(arguments: &[String]) -> io::Result<()> {
    if arguments.is_empty() {
        return Err(usage("DIRECTORY..."));
    }
    let open = |directory: &String| {
        let (first, other) =
            (Path::new(directory).join("first"), Path::new(directory).join("other"));
        let file = File::options().read(true).write(true).create_new(true).open(&first)?;
        fs::hard_link(&first, &other)?;
        fs::remove_file(&first)?;
        io::Result::Ok((file, other))
    };
    let files = arguments.iter().map(open).collect::<io::Result<Vec<(File, PathBuf)>>>()?;
    for number in 1_u64.. {
        for (file, other) in &files {
            let text = format!("{number:020}");
            file.write_all_at(text.as_bytes(), 0)?;
            let (found, links) = (fs::read_to_string(other)?, file.metadata()?.nlink());
            if found != text || links != 1 {
                let other = other.display();
                let text = format!("{other} has {found:?} and {links} links after write {number}");
                return Err(io::Error::other(text));
            }
        }
        report(&format!("linked {number}"))?;
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn usage(arguments: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("needs {arguments}"))
}
