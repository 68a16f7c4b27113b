//! A container's resource usage, read from its control groups' files and packed as containerd
//! expects it: `io.containerd.cgroups.v1.Metrics` or `io.containerd.cgroups.v2.Metrics`.
//!
//! A file that is missing (controller off, kernel without it) leaves its fields at zero; only a
//! container without any control group is an error.

mod v1;
mod v2;

use std::collections::HashMap;
use std::io;
use std::path::Path;

use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::util::convert_to_any;

use crate::cgroup::Cgroup;

/// The usage of `cgroup`. Errors: encoding.
pub(crate) fn collect(cgroup: &Cgroup) -> io::Result<Any> {
    let packed = match cgroup {
        Cgroup::V1(_) => convert_to_any(Box::new(v1::metrics(cgroup))),
        Cgroup::V2(dir) => convert_to_any(Box::new(v2::metrics(dir))),
    };
    packed.map_err(io::Error::other)
}

/// Text of a file, empty when it cannot be read.
fn text(dir: Option<&Path>, file: &str) -> String {
    dir.and_then(|dir| std::fs::read_to_string(dir.join(file)).ok()).unwrap_or_default()
}

/// A file that holds one number. `max` is the largest one.
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        digits => digits.parse().unwrap_or(0),
    }
}

/// Lines of a key and a number.
struct Keyed<'a>(HashMap<&'a str, u64>);

impl<'a> Keyed<'a> {
    fn parse(text: &'a str) -> Self {
        let pair = |line: &'a str| {
            let (key, value) = line.split_once(' ')?;
            Some((key, value.trim().parse().ok()?))
        };
        Self(text.lines().filter_map(pair).collect())
    }

    fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }
}
