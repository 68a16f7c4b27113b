//! Many bytes that do not compress, in a file that only the kernel's memory or an open descriptor
//! keeps.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::thread;

use crate::{TICK, report};

const BLOCK: usize = 1 << 20;

/// `bulk PATH MIB kept|deleted`: writes the file, removes its name or not, and holds it open. The
/// line: `holds` and the descriptor.
pub(crate) fn bulk(arguments: &[String]) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let usage = || io::Error::other("usage: bulk PATH MIB kept|deleted");
    let [path, mib, fate] = arguments else { return Err(usage()) };
    let mib: u64 = mib.parse().map_err(|_number| usage())?;
    let mut file = File::create_new(path)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..mib {
        let mut block = Vec::with_capacity(BLOCK);
        while block.len() < BLOCK {
            // xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators".
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            block.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
        file.write_all(&block)?;
    }
    if fate == "deleted" {
        fs::remove_file(path)?;
    }
    loop {
        report(&format!("holds {}", file.as_raw_fd()))?;
        thread::sleep(TICK);
    }
}
