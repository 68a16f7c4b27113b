//! A witness outside: it hears every step of a memhog, and from which address.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};

use crate::Bed;

/// A step of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The address of the node's network that it was made in.
    pub from: Ipv4Addr,
    /// Its number.
    pub count: u64,
}

/// Listens in the clients' network until the test process ends.
pub struct Witness {
    address: SocketAddr,
    steps: Arc<Mutex<Vec<Step>>>,
}

impl Witness {
    /// Starts listening.
    pub fn start(bed: &Bed) -> Result<Self> {
        let toward = bed.node(0).address();
        let (socket, address) = bed.as_client(|| {
            let socket = UdpSocket::bind(("0.0.0.0", 0))?;
            let probe = UdpSocket::bind(("0.0.0.0", 0))?;
            probe.connect((toward, 9))?;
            let address = SocketAddr::new(probe.local_addr()?.ip(), socket.local_addr()?.port());
            Ok((socket, address))
        })?;
        let steps = Arc::<Mutex<Vec<Step>>>::default();
        let heard = Arc::clone(&steps);
        thread::spawn(move || {
            let mut bytes = [0; 8];
            while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                if let (8, SocketAddr::V4(from)) = (length, from) {
                    let step = Step { from: *from.ip(), count: u64::from_le_bytes(bytes) };
                    heard.lock().unwrap_or_else(PoisonError::into_inner).push(step);
                }
            }
        });
        Ok(Self { address, steps })
    }

    /// Where memhog is to send its steps.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it has heard.
    pub fn steps(&self) -> Vec<Step> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Errors: a step was made twice, or went back.
    pub fn check(&self) -> Result<()> {
        let steps = self.steps();
        for pair in steps.windows(2) {
            let [first, second] = pair else { bail!("windows of two have two") };
            ensure!(second.count > first.count, "{second:?} after {first:?}");
        }
        steps.first().context("no step was heard").map(drop)
    }

    /// Steps from an address.
    pub fn steps_from(&self, address: Ipv4Addr) -> usize {
        self.steps().iter().filter(|step| step.from == address).count()
    }
}
