//! Connections to all peers that answer.

use std::sync::Arc;
use std::time::Duration;

use super::Connection;
use super::link::LinkStats;
use crate::config::Config;

/// How long a neighbour has to answer a hello.
pub const HELLO_MAX: Duration = Duration::from_millis(500);

/// Connections to the peers that answer a hello within `limit`, the fastest last, and the names of
/// those that do not. Those of `except` are not asked.
pub async fn connect(
    config: &Config,
    links: &LinkStats,
    limit: Duration,
    except: &[String],
) -> (Vec<Arc<Connection>>, Vec<String>) {
    let peers = config.peers.iter().filter(|peer| !except.contains(&peer.name));
    let open = peers.map(|peer| async {
        let opened = Connection::open(config, &peer.name, limit).await;
        opened.map(Arc::new).map_err(|_absent| peer.name.clone())
    });
    let (mut connections, mut absent) = (Vec::new(), Vec::new());
    for opened in futures::future::join_all(open).await {
        match opened {
            Ok(connection) => connections.push(connection),
            Err(name) => absent.push(name),
        }
    }
    let rate =
        |peer: &Arc<Connection>| links.of(&peer.node).throughput_bytes_per_second.unwrap_or(0.0);
    connections.sort_by(|one, other| rate(one).total_cmp(&rate(other)));
    (connections, absent)
}
