//! Control groups version 2. Times are in microseconds, and swap is counted apart from memory.

use std::path::Path;

use containerd_shim::protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};

use super::{Keyed, number, text};

pub(super) fn metrics(dir: &Path) -> Metrics {
    let dir = Some(dir);
    // containerd shows "no limit" as zero here, and as the largest number for memory.
    let pids_max = match number(&text(dir, "pids.max")) {
        u64::MAX => 0,
        limit => limit,
    };
    let pids = PidsStat {
        current: number(&text(dir, "pids.current")),
        limit: pids_max,
        ..Default::default()
    };
    Metrics {
        cpu: Some(cpu(&text(dir, "cpu.stat"))).into(),
        memory: Some(memory(dir)).into(),
        memory_events: Some(memory_events(&text(dir, "memory.events"))).into(),
        pids: Some(pids).into(),
        io: Some(IOStat { usage: io(&text(dir, "io.stat")), ..Default::default() }).into(),
        ..Default::default()
    }
}

fn cpu(text: &str) -> CPUStat {
    let stat = Keyed::parse(text);
    CPUStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        ..Default::default()
    }
}

fn memory(dir: Option<&Path>) -> MemoryStat {
    let stat = text(dir, "memory.stat");
    let stat = Keyed::parse(&stat);
    MemoryStat {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        anon_thp: stat.get("anon_thp"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        slab_reclaimable: stat.get("slab_reclaimable"),
        slab_unreclaimable: stat.get("slab_unreclaimable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        pgrefill: stat.get("pgrefill"),
        pgscan: stat.get("pgscan"),
        pgsteal: stat.get("pgsteal"),
        pgactivate: stat.get("pgactivate"),
        pgdeactivate: stat.get("pgdeactivate"),
        pglazyfree: stat.get("pglazyfree"),
        pglazyfreed: stat.get("pglazyfreed"),
        thp_fault_alloc: stat.get("thp_fault_alloc"),
        thp_collapse_alloc: stat.get("thp_collapse_alloc"),
        usage: number(&text(dir, "memory.current")),
        usage_limit: number(&text(dir, "memory.max")),
        max_usage: number(&text(dir, "memory.peak")),
        swap_usage: number(&text(dir, "memory.swap.current")),
        swap_limit: number(&text(dir, "memory.swap.max")),
        swap_max_usage: number(&text(dir, "memory.swap.peak")),
        ..Default::default()
    }
}

fn memory_events(text: &str) -> MemoryEvents {
    let events = Keyed::parse(text);
    MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        ..Default::default()
    }
}

/// Lines of `MAJOR:MINOR rbytes=N wbytes=N rios=N wios=N ...`
fn io(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut entry = IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            ..Default::default()
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = number(value);
            match key {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        Some(entry)
    };
    text.lines().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Method: files as a 6.12 kernel shows them for a small container.
    #[test]
    fn recorded_files() {
        let dir = tempfile::tempdir().unwrap();
        let files = [
            ("cpu.stat", "usage_usec 123\nuser_usec 100\nsystem_usec 23\nnr_throttled 1\n"),
            ("memory.stat", "anon 8192\nfile 4096\ninactive_file 1024\npgfault 77\n"),
            ("memory.current", "12288\n"),
            ("memory.max", "max\n"),
            ("memory.swap.max", "0\n"),
            ("memory.events", "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\n"),
            ("pids.current", "2\n"),
            ("pids.max", "100\n"),
            ("io.stat", "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n"),
        ];
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let metrics = metrics(dir.path());
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.system_usec), (123, 23));
        assert_eq!((metrics.memory.anon, metrics.memory.usage), (8192, 12288));
        assert_eq!((metrics.memory.usage_limit, metrics.memory.swap_limit), (u64::MAX, 0));
        assert_eq!((metrics.memory_events.oom, metrics.memory_events.oom_kill), (2, 1));
        assert_eq!((metrics.pids.current, metrics.pids.limit), (2, 100));
        assert_eq!((metrics.io.usage[0].rbytes, metrics.io.usage[0].wios), (4096, 2));
    }
}
