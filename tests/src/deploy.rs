//! The files that users install, as nodes get them: read from `docs/deploy/`, never written here.
//!
//! Only what differs from node to node, or exists because this is a test, is text of this module.

use std::fmt::Write;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};

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
    let documented = place::workspace().join("docs/deploy/containerd/godwit.toml");
    let text = fs::read_to_string(&documented)
        .with_context(|| format!("read {}", documented.display()))?;
    fs::write(drop_ins.join("godwit.toml"), text + CRI)?;
    fs::create_dir_all(etc.join("cni/net.d"))?;
    fs::write(etc.join("cni/net.d/pods.conflist"), CNI)?;
    fs::create_dir_all(etc.join("godwit"))?;
    fs::write(etc.join("godwit/godwit.toml"), daemon(node, address, peers, keys))?;
    Ok(())
}

/// The daemon's configuration; `keys` are further ones, those of tables last.
pub(crate) fn daemon(
    node: &str,
    address: Ipv4Addr,
    peers: &[(String, Ipv4Addr)],
    keys: &str,
) -> String {
    let mut text = format!(
        "node = \"{node}\"\n\
         listen = \"{address}:{PEER_PORT}\"\n\
         insecure = true\n\
         state_dir = \"/var/lib/godwit\"\n\
         run_dir = \"/run/godwit\"\n\
         containerd_socket = \"/run/containerd/containerd.sock\"\n{keys}\n"
    );
    for (name, address) in peers {
        let address = format!("{address}:{PEER_PORT}");
        let _ = write!(text, "\n[[peers]]\nname = \"{name}\"\naddress = \"{address}\"\n");
    }
    text
}
