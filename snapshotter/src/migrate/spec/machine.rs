//! What this node's hardware and kernel offer that a specification may name.

use std::fmt;
use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;
use std::str::FromStr;

/// Processors, memory nodes, sizes of huge pages and AppArmor profiles of this node.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// Processors that are online.
    pub processors: Numbers,
    /// Memory nodes that are online.
    pub memory_nodes: Numbers,
    /// Sizes of huge pages as the specification writes them, such as "2MB".
    pub huge_pages: Vec<String>,
    /// Loaded profiles; none without AppArmor.
    pub apparmor_profiles: Vec<String>,
}

impl Machine {
    /// Reads them below `sys`, where sysfs is mounted. What cannot be read is taken to be absent.
    pub fn read(sys: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(sys.join(path)).unwrap_or_default();
        let numbers = |path: &str| text(path).parse().unwrap_or_default();
        let entries = fs::read_dir(sys.join("kernel/mm/hugepages")).into_iter().flatten();
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let profiles = text("kernel/security/apparmor/profiles");
        let profile = |line: &str| Some(line.rsplit_once(" (")?.0.to_owned());
        let mut memory_nodes: Numbers = numbers("devices/system/node/online");
        if memory_nodes.0.is_empty() {
            // A kernel without NUMA has the one node 0 and says nothing of it.
            memory_nodes.0.push(0..=0);
        }
        Self {
            processors: numbers("devices/system/cpu/online"),
            memory_nodes,
            huge_pages: names.filter_map(|name| page_size(&name)).collect(),
            apparmor_profiles: profiles.lines().filter_map(profile).collect(),
        }
    }
}

/// The size of `hugepages-2048kB` as the specification writes it: "2MB".
fn page_size(directory: &str) -> Option<String> {
    let kib = directory.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()?;
    let (mut size, mut units) = (kib, ["KB", "MB", "GB"].iter());
    let mut unit = units.next()?;
    while size >= 1024 && size % 1024 == 0 {
        let Some(next) = units.next() else { break };
        (size, unit) = (size / 1024, next);
    }
    Some(format!("{size}{unit}"))
}

/// Numbers as the kernel lists them: "0-3,7".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers(Vec<RangeInclusive<u32>>);

impl Numbers {
    /// Whether all of `others` are among these, which the kernel has listed without adjacent
    /// ranges.
    pub fn contains(&self, others: &Self) -> bool {
        let within = |other: &RangeInclusive<u32>| {
            self.0.iter().any(|range| range.contains(other.start()) && range.contains(other.end()))
        };
        others.0.iter().all(within)
    }
}

impl FromStr for Numbers {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Ok(first.trim().parse()?..=last.trim().parse()?)
        };
        parts.map(range).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, range) in self.0.iter().enumerate() {
            f.write_str(if place == 0 { "" } else { "," })?;
            write!(f, "{}", range.start())?;
            if range.start() != range.end() {
                write!(f, "-{}", range.end())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_part_of_another_or_not() {
        let here: Numbers = "0-3,7\n".parse().unwrap();
        let has = |list: &str| here.contains(&list.parse().unwrap());
        assert_eq!(["", "0", "1-2, 7", "0-3"].map(has), [true; 4]);
        assert_eq!(["4", "3-4", "6-7", "0-4294967295"].map(has), [false; 4]);
        assert!("1-x".parse::<Numbers>().is_err());
        assert_eq!(here.to_string(), "0-3,7");
    }

    #[test]
    fn a_machine_is_read_from_sysfs() {
        let sys = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("devices/system/cpu/online", "0-1\n");
        write(
            "kernel/security/apparmor/profiles",
            "a (b) c (enforce)\ndocker-default (complain)\n",
        );
        for size in ["hugepages-2048kB/x", "hugepages-1048576kB/x", "hugepages-64kB/x"] {
            write(&format!("kernel/mm/hugepages/{size}"), "");
        }
        let mut machine = Machine::read(sys.path());
        machine.huge_pages.sort_unstable();
        assert_eq!(machine.huge_pages, ["1GB", "2MB", "64KB"]);
        assert_eq!(machine.apparmor_profiles, ["a (b) c", "docker-default"]);
        assert_eq!(machine.processors.to_string(), "0-1");
        assert_eq!(machine.memory_nodes.to_string(), "0");
    }
}
