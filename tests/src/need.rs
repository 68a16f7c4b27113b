//! What a suite needs from the machine, said clearly when it is not there.

use anyhow::{Result, bail};
use nix::unistd::geteuid;

use crate::place;

/// Errors: not root. Namespaces, mounts, CRIU and the cgroups of nodes need it.
pub fn root() -> Result<()> {
    if geteuid().is_root() {
        return Ok(());
    }
    bail!("test nodes need root: run this as root (sudo make ...)")
}

/// Errors: a program of this build is missing.
pub fn binaries(names: &[&str]) -> Result<()> {
    for name in names {
        let path = place::binary(name);
        if !path.is_file() {
            bail!("{} is not there: run `make build` first", path.display());
        }
    }
    Ok(())
}
