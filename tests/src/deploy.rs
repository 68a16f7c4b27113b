//! The files that users install, as nodes get them: read from `docs/deploy/`, never written here.
//!
//! Only what differs from node to node, or exists because this is a test, is text of this module.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};
use toml::{Table, Value};

use crate::place;

/// Port of the daemon's peer service.
pub const PEER_PORT: u16 = 7946;

/// containerd's own configuration in a node: nothing but the drop-ins.
const CONTAINERD: &str = "version = 2\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n";

/// What pods need besides here: root without CAP_SYS_RESOURCE cannot lower an OOM score, which the
/// CRI plugin does by default; there is no registry for the pause image; Debian keeps CNI plugins
/// in a place of its own; a second handler runs the other OCI runtime, and a third our shim by its
/// name; and where it looks for mirrors, of which there is none until a test names one. It goes
/// into the same file as the documented settings, since containerd 1.7 takes each plugin's section
/// from one file.
const CRI: &str = "
[plugins.\"io.containerd.grpc.v1.cri\"]
  restrict_oom_score_adj = true
  sandbox_image = \"localhost/pause:test\"

[plugins.\"io.containerd.grpc.v1.cri\".registry]
  config_path = \"/etc/containerd/certs.d\"

[plugins.\"io.containerd.grpc.v1.cri\".cni]
  bin_dir = \"/usr/lib/cni\"

[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.godwit-crun]
  runtime_type = \"io.containerd.runc.godwit.v1\"

[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.godwit-crun.options]
  BinaryName = \"crun\"

[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.godwit-by-name]
  runtime_type = \"io.containerd.runc.godwit.v1\"
";

/// The pods' network: a bridge of their own in each node.
const CNI: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "pods0",
"isGateway": true, "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]]}}]}
"#;

/// Puts the configuration of a node into its file system at `etc`, before it starts.
pub(crate) fn configure(
    etc: &Path,
    node: &str,
    address: Ipv4Addr,
    peers: &[(String, Ipv4Addr)],
    keys: &str,
) -> Result<()> {
    let drop_ins = etc.join("containerd/conf.d");
    fs::create_dir_all(&drop_ins)?;
    fs::write(etc.join("containerd/config.toml"), CONTAINERD)?;
    let text = documented("docs/deploy/containerd/godwit.toml")?;
    fs::write(drop_ins.join("godwit.toml"), text + CRI)?;
    fs::create_dir_all(etc.join("cni/net.d"))?;
    fs::write(etc.join("cni/net.d/pods.conflist"), CNI)?;
    fs::create_dir_all(etc.join("godwit"))?;
    fs::write(etc.join("godwit/godwit.toml"), daemon(node, address, peers, keys)?)?;
    Ok(())
}

/// The daemon's configuration: the documented one with this node's name, address and peers, and
/// with further `keys`, which replace those of the same name.
pub(crate) fn daemon(
    node: &str,
    address: Ipv4Addr,
    peers: &[(String, Ipv4Addr)],
    keys: &str,
) -> Result<String> {
    let mut configuration: Table = documented("docs/deploy/godwit.toml")?.parse()?;
    let own = format!("node = \"{node}\"\nlisten = \"{address}:{PEER_PORT}\"\ninsecure = true");
    merge(&mut configuration, own.parse()?);
    merge(&mut configuration, keys.parse().context("further keys of the configuration")?);
    let peer = |(name, address): &(String, Ipv4Addr)| -> Value {
        let address = format!("{address}:{PEER_PORT}");
        Table::from_iter([("name", name.clone()), ("address", address)].map(entry)).into()
    };
    if !peers.is_empty() {
        let peers: Vec<Value> = peers.iter().map(peer).collect();
        configuration.insert("peers".to_owned(), peers.into());
    }
    Ok(configuration.to_string())
}

fn entry((key, value): (&str, String)) -> (String, Value) {
    (key.to_owned(), value.into())
}

/// The command line by which the documented unit file starts the daemon.
pub(crate) fn daemon_command() -> Result<String> {
    let unit = documented("docs/deploy/godwit-snapshotter.service")?;
    let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart="));
    line.map(str::to_owned).context("the unit file has no line ExecStart=")
}

fn documented(path: &str) -> Result<String> {
    let path = place::workspace().join(path);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// Adds `from` to `to`: tables key by key, anything else replaces what was there.
fn merge(to: &mut Table, from: Table) {
    for (key, value) in from {
        match (to.get_mut(&key), value) {
            (Some(Value::Table(to)), Value::Table(from)) => merge(to, from),
            (_, value) => drop(to.insert(key, value)),
        }
    }
}
