//! Control groups version 1. Times are in nanoseconds, as containerd's message wants them.

use std::path::Path;

use containerd_shim::protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl,
    MemoryStat, Metrics, PidsStat, Throttle,
};

use super::{Keyed, number, text};
use crate::cgroup::Cgroup;

/// `cpuacct.stat` counts in these: the kernel's USER_HZ is 100 on every architecture it runs on
/// today.
const TICK_NS: u64 = 1_000_000_000 / 100;

pub(super) fn metrics(cgroup: &Cgroup) -> Metrics {
    let memory = cgroup.dir("memory");
    let oom = text(memory, "memory.oom_control");
    Metrics {
        cpu: Some(cpu(cgroup.dir("cpuacct"), cgroup.dir("cpu"))).into(),
        memory: Some(memory_stat(memory)).into(),
        memory_oom_control: Some(oom_control(&oom)).into(),
        pids: Some(pids(cgroup.dir("pids"))).into(),
        blkio: Some(blkio(cgroup.dir("blkio"))).into(),
        hugetlb: cgroup.dir("hugetlb").map(hugetlb).unwrap_or_default(),
        ..Default::default()
    }
}

fn cpu(cpuacct: Option<&Path>, cpu: Option<&Path>) -> CPUStat {
    let stat = text(cpuacct, "cpuacct.stat");
    let stat = Keyed::parse(&stat);
    let per_cpu = text(cpuacct, "cpuacct.usage_percpu");
    let throttled = text(cpu, "cpu.stat");
    let throttled = Keyed::parse(&throttled);
    CPUStat {
        usage: Some(CPUUsage {
            total: number(&text(cpuacct, "cpuacct.usage")),
            kernel: stat.get("system") * TICK_NS,
            user: stat.get("user") * TICK_NS,
            per_cpu: per_cpu.split_whitespace().map(number).collect(),
            ..Default::default()
        })
        .into(),
        throttling: Some(Throttle {
            periods: throttled.get("nr_periods"),
            throttled_periods: throttled.get("nr_throttled"),
            throttled_time: throttled.get("throttled_time"),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn memory_stat(dir: Option<&Path>) -> MemoryStat {
    let stat = text(dir, "memory.stat");
    let stat = Keyed::parse(&stat);
    MemoryStat {
        cache: stat.get("cache"),
        rss: stat.get("rss"),
        rss_huge: stat.get("rss_huge"),
        mapped_file: stat.get("mapped_file"),
        dirty: stat.get("dirty"),
        writeback: stat.get("writeback"),
        pg_pg_in: stat.get("pgpgin"),
        pg_pg_out: stat.get("pgpgout"),
        pg_fault: stat.get("pgfault"),
        pg_maj_fault: stat.get("pgmajfault"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        hierarchical_memory_limit: stat.get("hierarchical_memory_limit"),
        hierarchical_swap_limit: stat.get("hierarchical_memsw_limit"),
        total_cache: stat.get("total_cache"),
        total_rss: stat.get("total_rss"),
        total_rss_huge: stat.get("total_rss_huge"),
        total_mapped_file: stat.get("total_mapped_file"),
        total_dirty: stat.get("total_dirty"),
        total_writeback: stat.get("total_writeback"),
        total_pg_pg_in: stat.get("total_pgpgin"),
        total_pg_pg_out: stat.get("total_pgpgout"),
        total_pg_fault: stat.get("total_pgfault"),
        total_pg_maj_fault: stat.get("total_pgmajfault"),
        total_inactive_anon: stat.get("total_inactive_anon"),
        total_active_anon: stat.get("total_active_anon"),
        total_inactive_file: stat.get("total_inactive_file"),
        total_active_file: stat.get("total_active_file"),
        total_unevictable: stat.get("total_unevictable"),
        usage: Some(entry(dir, "memory")).into(),
        swap: Some(entry(dir, "memory.memsw")).into(),
        kernel: Some(entry(dir, "memory.kmem")).into(),
        kernel_tcp: Some(entry(dir, "memory.kmem.tcp")).into(),
        ..Default::default()
    }
}

fn entry(dir: Option<&Path>, prefix: &str) -> MemoryEntry {
    let read = |name: &str| number(&text(dir, &format!("{prefix}.{name}")));
    MemoryEntry {
        limit: read("limit_in_bytes"),
        usage: read("usage_in_bytes"),
        max: read("max_usage_in_bytes"),
        failcnt: read("failcnt"),
        ..Default::default()
    }
}

fn oom_control(text: &str) -> MemoryOomControl {
    let keys = Keyed::parse(text);
    MemoryOomControl {
        oom_kill_disable: keys.get("oom_kill_disable"),
        under_oom: keys.get("under_oom"),
        oom_kill: keys.get("oom_kill"),
        ..Default::default()
    }
}

fn pids(dir: Option<&Path>) -> PidsStat {
    // containerd shows "no limit" as zero.
    let limit = match number(&text(dir, "pids.max")) {
        u64::MAX => 0,
        limit => limit,
    };
    PidsStat { current: number(&text(dir, "pids.current")), limit, ..Default::default() }
}

fn blkio(dir: Option<&Path>) -> BlkIOStat {
    let entries = |cfq: &str, throttle: &str| {
        let found = blkio_entries(&text(dir, cfq));
        if found.is_empty() { blkio_entries(&text(dir, throttle)) } else { found }
    };
    BlkIOStat {
        io_service_bytes_recursive: entries(
            "blkio.bfq.io_service_bytes_recursive",
            "blkio.throttle.io_service_bytes_recursive",
        ),
        io_serviced_recursive: entries(
            "blkio.bfq.io_serviced_recursive",
            "blkio.throttle.io_serviced_recursive",
        ),
        ..Default::default()
    }
}

/// Lines of `MAJOR:MINOR OPERATION BYTES`; the line with the total names no device.
fn blkio_entries(text: &str) -> Vec<BlkIOEntry> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        Some(BlkIOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            op: words.next()?.to_owned(),
            value: words.next()?.parse().ok()?,
            ..Default::default()
        })
    };
    text.lines().filter_map(entry).collect()
}

fn hugetlb(dir: &Path) -> Vec<HugetlbStat> {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = names.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix("hugetlb.")?.strip_suffix(".usage_in_bytes").map(str::to_owned)
    });
    let stat = |pagesize: String| {
        let read = |name: &str| number(&text(Some(dir), &format!("hugetlb.{pagesize}.{name}")));
        HugetlbStat {
            usage: read("usage_in_bytes"),
            max: read("max_usage_in_bytes"),
            failcnt: read("failcnt"),
            pagesize,
            ..Default::default()
        }
    };
    sizes.filter(|size| !size.contains("rsvd")).map(stat).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Method: files as a 6.18 kernel shows them for a small container.
    #[test]
    fn recorded_files() {
        let dir = tempfile::tempdir().unwrap();
        let files = [
            ("cpuacct.usage", "10931080\n"),
            ("cpuacct.stat", "user 2\nsystem 3\n"),
            ("cpuacct.usage_percpu", "4000000 6931080 \n"),
            ("cpu.stat", "nr_periods 10\nnr_throttled 4\nthrottled_time 250\n"),
            (
                "memory.stat",
                "cache 4096\nrss 8192\nhierarchical_memory_limit 1048576\ntotal_rss 8192\n",
            ),
            ("memory.usage_in_bytes", "16384\n"),
            ("memory.limit_in_bytes", "1048576\n"),
            ("memory.max_usage_in_bytes", "20480\n"),
            ("memory.failcnt", "1\n"),
            ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            (
                "blkio.throttle.io_service_bytes_recursive",
                "254:0 Read 4096\n254:0 Total 4096\nTotal 4096\n",
            ),
        ];
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let controllers = ["cpu", "cpuacct", "memory", "pids", "blkio"];
        let dirs = controllers.map(|name| (name.to_owned(), dir.path().to_owned()));
        let metrics = metrics(&Cgroup::V1(dirs.into()));
        let usage = &metrics.cpu.usage;
        assert_eq!((usage.total, usage.user, usage.kernel), (10_931_080, 20_000_000, 30_000_000));
        assert_eq!(usage.per_cpu, [4_000_000, 6_931_080]);
        assert_eq!(metrics.cpu.throttling.throttled_time, 250);
        assert_eq!((metrics.memory.rss, metrics.memory.usage.usage), (8192, 16384));
        assert_eq!((metrics.memory.usage.limit, metrics.memory.usage.failcnt), (1_048_576, 1));
        assert_eq!(metrics.memory_oom_control.oom_kill, 2);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 0));
        assert_eq!(metrics.blkio.io_service_bytes_recursive.len(), 2);
    }

    #[test]
    fn nothing_to_read_is_all_zero() {
        let metrics = metrics(&Cgroup::V1(std::collections::HashMap::new()));
        assert_eq!((metrics.cpu.usage.total, metrics.memory.usage.usage), (0, 0));
    }
}
