//! Leases: which session has a container or a volume for the length of a migration.
//!
//! ```text
//!  destination   arriving   from the request until the container has come, or all that was made for it is removed
//!  source        leaving    from the first message of the session until the container runs on, or has been let go
//!  any           captured   while a consistent snapshot is taken
//! ```
//!
//! A lease covers the container and its writable volumes in one transaction: a session has all of
//! them or none. A start, mount, snapshot, migration or deletion of one of them is refused with the
//! lease's reason ([`Journal::check_lease`]).
//!
//! At the destination a lease is also the permission to remove: what a session made carries the
//! session's name (`migrate::marks`), and a daemon that starts removes it only while the journal
//! has the session's lease. Without a lease, as in an older copy of the journal, everything stays.
//!
//! On open: leases of sessions that died with the daemon are dropped, except those of released
//! containers that have not been let go ([`Journal::end_leaving`]), and those of containers that
//! arrive, until `migrate::request::remove_abandoned` has seen to them.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use godwit_protos::{ContainerRef, VolumeId};
use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::Ownership;
use super::journal::{Entry, Journal, JournalError, parse, put};

/// Key: [`Leased`] as text. Value: [`Lease`] as JSON.
pub(super) const LEASES: TableDefinition<&str, &[u8]> = TableDefinition::new("leases_v1");

/// How long a session waits for one that has just failed and is being undone, or for a snapshot.
const TAKEN_WAIT: Duration = Duration::from_secs(10);
const TAKEN_PAUSE: Duration = Duration::from_millis(50);

/// What a lease is on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leased {
    /// A container.
    Container(ContainerRef),
    /// A writable volume.
    Volume(VolumeId),
}

impl fmt::Display for Leased {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Container(container) => write!(f, "container {container}"),
            Self::Volume(id) => write!(f, "volume {id}"),
        }
    }
}

impl Leased {
    fn parse(text: &str) -> Option<Self> {
        match text.split_once(' ')? {
            ("container", name) => {
                let (namespace, id) = name.split_once('/')?;
                ContainerRef::new(namespace, id).ok().map(Self::Container)
            }
            ("volume", id) => id.parse().ok().map(Self::Volume),
            _ => None,
        }
    }
}

/// What happens to a leased container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// It comes here.
    Arriving,
    /// It goes to another node.
    Leaving,
    /// A consistent snapshot of it is taken.
    Captured,
}

/// A session's hold on a container or a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The session that has it.
    pub session: String,
    /// What happens to it.
    pub purpose: Purpose,
    /// The other node; this one for a snapshot.
    pub peer: String,
    /// The container that moves, `NAMESPACE/ID`, as it is called here.
    pub container: String,
}

impl Lease {
    /// A lease of `session` for `container`, which moves from or to `peer`.
    pub fn new(session: &str, purpose: Purpose, container: &ContainerRef, peer: &str) -> Self {
        let (session, peer) = (session.to_owned(), peer.to_owned());
        Self { session, purpose, peer, container: container.to_string() }
    }
}

/// A lease that ends when this is dropped.
#[derive(Debug)]
pub struct Held {
    journal: Journal,
    session: String,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Err(error) = self.journal.end_lease(&self.session) {
            let session = &self.session;
            tracing::error!(session, %error, "a lease stays until the daemon starts again");
        }
    }
}

/// In the words of an error: "is leaving with container default/cache to edge-b".
impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { container, peer, .. } = self;
        match self.purpose {
            Purpose::Arriving => write!(f, "is arriving with container {container} from {peer}"),
            Purpose::Leaving => write!(f, "is leaving with container {container} to {peer}"),
            Purpose::Captured => {
                write!(f, "is part of a consistent snapshot of {container}, which is being taken")
            }
        }
    }
}

/// Why a lease cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Another session has the container or volume.
    #[error("{} {}", .0.0, .0.1)]
    Taken(Box<(Leased, Lease)>),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl Journal {
    /// Leases a container and its volumes for `lease.session`: all of them, or none. A session may
    /// add to what it has.
    ///
    /// Errors: [`LeaseError::Taken`] for the first that another session has.
    pub fn take_lease(&self, leased: &[Leased], lease: &Lease) -> Result<(), LeaseError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(LEASES).map_err(|error| self.failed(error))?;
            for one in leased {
                let key = one.to_string();
                let held = table.get(key.as_str()).map_err(|error| self.failed(error))?;
                let held = held.map(|value| parse::<Lease>(&key, value.value())).transpose()?;
                if let Some(held) = held.filter(|held| held.session != lease.session) {
                    // Nothing was changed, so what is committed is what was there.
                    return Ok(Err(LeaseError::Taken(Box::new((one.clone(), held)))));
                }
            }
            for one in leased {
                put(&mut table, &one.to_string(), lease).map_err(|error| self.failed(error))?;
            }
            Ok(Ok(()))
        })?
    }

    /// [`Self::take_lease`], which waits for another session: one that has just failed, or a
    /// snapshot, may still have them.
    ///
    /// Errors: [`LeaseError::Taken`] after [`TAKEN_WAIT`].
    pub async fn take_lease_soon(
        &self,
        leased: &[Leased],
        lease: &Lease,
    ) -> Result<(), LeaseError> {
        let deadline = Instant::now() + TAKEN_WAIT;
        loop {
            match self.take_lease(leased, lease) {
                Err(LeaseError::Taken(_)) if Instant::now() < deadline => {
                    tokio::time::sleep(TAKEN_PAUSE).await;
                }
                taken => return taken,
            }
        }
    }

    /// [`Self::take_lease`], until the result is dropped.
    pub fn hold_lease(&self, leased: &[Leased], lease: &Lease) -> Result<Held, LeaseError> {
        self.take_lease(leased, lease)?;
        Ok(Held { journal: self.clone(), session: lease.session.clone() })
    }

    /// Ends the leases of a container that was leaving: it runs on here, or has been let go.
    pub fn end_leaving(&self, container: &ContainerRef) -> Result<(), JournalError> {
        let name = container.to_string();
        self.drop_leases(|_, lease| lease.purpose == Purpose::Leaving && lease.container == name)
    }

    /// Ends the leases of sessions that died with an earlier daemon. Caller: on open.
    pub(super) fn drop_dead_leases(&self) -> Result<(), JournalError> {
        let entries = self.containers()?.into_iter();
        let is_open = |entry: &Entry| matches!(entry.ownership, Ownership::Released(..));
        let open = entries.filter(|(_, entry)| is_open(entry));
        let open: BTreeSet<String> = open.map(|(container, _)| container.to_string()).collect();
        self.drop_leases(|_, lease| match lease.purpose {
            Purpose::Arriving => false,
            Purpose::Leaving => !open.contains(&lease.container),
            Purpose::Captured => true,
        })
    }

    /// Ends all leases of a session. Ending them twice is safe.
    pub fn end_lease(&self, session: &str) -> Result<(), JournalError> {
        self.drop_leases(|_, lease| lease.session == session)
    }

    /// Ends the leases that `is_over` names.
    pub(super) fn drop_leases(
        &self,
        is_over: impl Fn(&Leased, &Lease) -> bool,
    ) -> Result<(), JournalError> {
        let over: Vec<_> =
            self.leases()?.into_iter().filter(|(leased, lease)| is_over(leased, lease)).collect();
        if over.is_empty() {
            return Ok(());
        }
        self.write(|transaction| {
            let mut table = transaction.open_table(LEASES).map_err(|error| self.failed(error))?;
            for (leased, _) in &over {
                let removed = table.remove(leased.to_string().as_str());
                removed.map(drop).map_err(|error| self.failed(error))?;
            }
            Ok(())
        })
    }

    /// Every lease.
    pub fn leases(&self) -> Result<Vec<(Leased, Lease)>, JournalError> {
        let read = self.begin_read()?;
        let table = read.open_table(LEASES).map_err(|error| self.failed(error))?;
        let mut leases = Vec::new();
        for row in table.iter().map_err(|error| self.failed(error))? {
            let (key, value) = row.map_err(|error| self.failed(error))?;
            let lease = parse(key.value(), value.value())?;
            leases.extend(Leased::parse(key.value()).map(|leased| (leased, lease)));
        }
        Ok(leases)
    }

    /// The lease on a container or volume.
    pub fn lease_of(&self, leased: &Leased) -> Result<Option<Lease>, JournalError> {
        Ok(self.leases()?.into_iter().find(|(one, _)| one == leased).map(|(_, lease)| lease))
    }

    /// Checks that no migration has the container or volume, or that it is `container`'s own.
    ///
    /// Errors: [`LeaseError::Taken`], which says where it goes.
    pub fn check_lease(
        &self,
        leased: &Leased,
        container: Option<&ContainerRef>,
    ) -> Result<(), LeaseError> {
        let own = container.map(ToString::to_string);
        match self.lease_of(leased)? {
            Some(lease) if own.as_ref() != Some(&lease.container) => {
                Err(LeaseError::Taken(Box::new((leased.clone(), lease))))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::{Epoch, Event};

    fn journal(dir: &std::path::Path) -> Journal {
        Journal::open(&dir.join("node.redb"), &dir.join("fences")).unwrap()
    }

    fn lease(session: &str, purpose: Purpose) -> Lease {
        let container = ContainerRef::new("default", "cache").unwrap();
        Lease::new(session, purpose, &container, "edge-b")
    }

    /// Method: two sessions that want the same volume; a journal that is opened again.
    #[test]
    fn a_lease_is_on_everything_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (cache, other) = ("default/cache", "default/other");
        let named = |name: &str| {
            let (namespace, id) = name.split_once('/').unwrap();
            ContainerRef::new(namespace, id).unwrap()
        };
        let container = |name: &str| Leased::Container(named(name));
        let volume = |id: &str| Leased::Volume(id.parse().unwrap());
        let here = journal(dir.path());
        let wanted = [container(cache), volume("data")];
        here.take_lease(&wanted, &lease("one", Purpose::Leaving)).unwrap();
        here.take_lease(&wanted, &lease("one", Purpose::Leaving)).unwrap();
        let wanted = [container(other), volume("data")];
        let refused = here.take_lease(&wanted, &lease("two", Purpose::Arriving)).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "volume data is leaving with container default/cache to edge-b"
        );
        assert_eq!(here.lease_of(&container(other)).unwrap(), None);
        let own = named(cache);
        here.check_lease(&volume("data"), Some(&own)).unwrap();
        here.check_lease(&volume("data"), Some(&named(other))).unwrap_err();
        here.check_lease(&volume("data"), None).unwrap_err();

        here.end_lease("one").unwrap();
        here.end_lease("one").unwrap();
        here.take_lease(&wanted, &lease("two", Purpose::Arriving)).unwrap();
        let told = here.check_lease(&volume("data"), None).unwrap_err().to_string();
        assert!(told.contains("arriving with container default/cache from edge-b"), "{told}");
    }

    /// Method: a session asks for what another one has, which then ends.
    #[tokio::test]
    async fn a_session_that_has_just_failed_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let here = journal(dir.path());
        let wanted = [Leased::Volume("data".parse().unwrap())];
        let [failed, next] = ["failed", "next"].map(|one| lease(one, Purpose::Arriving));
        here.take_lease(&wanted, &failed).unwrap();
        here.take_lease(&wanted, &next).unwrap_err();
        let ends = async { here.end_lease("failed").unwrap() };
        let (taken, ()) = tokio::join!(here.take_lease_soon(&wanted, &next), ends);
        taken.unwrap();
    }

    /// Method: one lease of each kind, and the journal is opened again; then the container is
    /// released.
    #[test]
    fn leases_of_dead_sessions_end_on_open_where_nothing_depends_on_them() {
        let dir = tempfile::tempdir().unwrap();
        let container = ContainerRef::new("default", "cache").unwrap();
        let leased = |id: &str| [Leased::Volume(id.parse().unwrap())];
        let here = journal(dir.path());
        here.take_lease(&leased("a"), &lease("1", Purpose::Arriving)).unwrap();
        here.take_lease(&leased("l"), &lease("2", Purpose::Leaving)).unwrap();
        here.take_lease(&leased("c"), &lease("3", Purpose::Captured)).unwrap();
        drop(here);
        let here = journal(dir.path());
        let left = here.leases().unwrap();
        assert_eq!(left, [(leased("a")[0].clone(), lease("1", Purpose::Arriving))]);

        here.take_lease(&leased("l"), &lease("2", Purpose::Leaving)).unwrap();
        let offer = Event::Offer("edge-b/default/cache".to_owned(), Epoch(0));
        here.apply(&container, &offer, |_| {}).unwrap();
        here.apply(&container, &Event::Release(Epoch(1)), |_| {}).unwrap();
        drop(here);
        let here = journal(dir.path());
        assert_eq!(here.leases().unwrap().len(), 2);
        here.end_leaving(&container).unwrap();
        assert_eq!(here.leases().unwrap(), left);
        drop(here.hold_lease(&leased("c"), &lease("4", Purpose::Captured)).unwrap());
        assert_eq!(here.leases().unwrap(), left);
    }
}
