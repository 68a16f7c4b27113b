//! The witness: a thread in each node's network that writes down every step it hears of.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Step;
use crate::Bed;

/// Port that the witness listens on, in every node.
pub const PORT: u16 = 7100;
/// The witness's address, on the loopback interface of every node; outside of the bed's network.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 99, 99, 1);
/// How often a thread looks whether it should end.
const LOOK: Duration = Duration::from_millis(100);
/// Longest packet.
const PACKET_BYTES: usize = 512;

/// The witness's address, the same in every node.
pub fn address() -> SocketAddr {
    SocketAddr::V4(SocketAddrV4::new(ADDRESS, PORT))
}

/// A step, and the node whose containers sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// Index of the node in the bed.
    pub node: usize,
    /// What was heard.
    pub step: Step,
}

/// Threads that listen. Dropping it ends them.
pub struct Witness {
    stop: Arc<AtomicBool>,
    heard: Arc<Mutex<Vec<Sighting>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Witness {
    /// Starts listening in every node of a bed. It goes on through crashes of nodes, whose networks
    /// outlive them.
    pub fn start(bed: &Bed) -> Result<Self> {
        let (stop, heard) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let mut witness = Self { stop, heard, threads: Vec::new() };
        for (node, at) in bed.nodes().iter().enumerate() {
            at.in_network(|| {
                crate::command::host(&["ip", "addr", "add", &format!("{ADDRESS}/32"), "dev", "lo"])
            })?;
            let socket = at.in_network(|| UdpSocket::bind((ADDRESS, PORT)).context("listen"))?;
            socket.set_read_timeout(Some(LOOK))?;
            let (stop, heard) = (witness.stop.clone(), witness.heard.clone());
            let listen = move || listen(node, &socket, &stop, &heard);
            let thread = std::thread::Builder::new().name(format!("witness-{node}"));
            witness.threads.push(thread.spawn(listen)?);
        }
        Ok(witness)
    }

    /// Everything heard so far.
    pub fn history(&self) -> Vec<Sighting> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets what was heard.
    pub fn forget(&self) {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The last step that was heard of at a node.
    pub fn last_at(&self, node: usize) -> Option<Step> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.iter().rev().find(|sighting| sighting.node == node).map(|last| last.step.clone())
    }
}

/// A route to the witness from a container's network at a node.
pub fn route(at: &crate::Node, network: &str) -> Result<()> {
    let (to, via) = (ADDRESS.to_string(), at.address().to_string());
    at.ok(&["ip", "-n", network, "route", "add", &to, "via", &via]).map(drop)
}

fn listen(node: usize, socket: &UdpSocket, stop: &AtomicBool, heard: &Mutex<Vec<Sighting>>) {
    let mut packet = [0; PACKET_BYTES];
    while !stop.load(Ordering::Relaxed) {
        let Ok(length) = socket.recv(&mut packet) else { continue };
        let text = std::str::from_utf8(&packet[..length]).unwrap_or_default();
        if let Ok(step) = text.parse() {
            heard.lock().unwrap_or_else(PoisonError::into_inner).push(Sighting { node, step });
        }
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("a witness's thread has panicked");
            }
        }
    }
}
