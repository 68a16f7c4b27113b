//! Godwit's words: the services its processes speak and the domain types they share.
//!
//! Three services, one file each under `proto/`: [`control`] (ttrpc, Unix socket) is what shims and
//! `godwit` ask of the node's daemon; [`shim`] (ttrpc, next to containerd's Task service) is what
//! the daemon asks of a shim; [`peer`] (gRPC over TCP) is what daemons ask each other. The rest are
//! the names that all of them use: [`Digest`], [`Subject`], [`VolumeId`], [`ContainerRef`],
//! [`MigrateFrom`].
//!
//! This crate is a leaf: it opens no file and no socket. Text that comes from outside is parsed
//! here, and only here, into types that cannot hold anything else.

mod digest;
mod names;

pub use digest::{Digest, ParseDigestError};
pub use names::{
    ContainerRef, FileSystem, MigrateFrom, ParseNameError, ServiceRef, Subject, VolumeId,
    VolumeSource, is_name,
};

/// What containerd's configuration calls our snapshotter.
pub const SNAPSHOTTER: &str = "godwit";

/// Annotations that Godwit reads from a container's OCI specification.
pub mod annotation {
    /// Where to take the container from: `NODE/NAMESPACE/CONTAINER` ([`crate::MigrateFrom`]).
    pub const MIGRATE_FROM: &str = "godwit.io/migrate-from";
    /// Which cut on this node to start from: `sha256:` and 64 hexadecimal digits.
    pub const RESTORE_FROM: &str = "godwit.io/restore-from";
    /// "cooperative" (the default) or "traditional".
    pub const MODE: &str = "godwit.io/mode";
    /// Rounds of pre-copy before the stop.
    pub const MAX_ROUNDS: &str = "godwit.io/max-rounds";
    /// "yes" (the default) or "no": whether the writable layer moves too.
    pub const WRITABLE_LAYER: &str = "godwit.io/writable-layer";
    /// Name of the service for looking up cached memory; the image's name by default.
    pub const SERVICE: &str = "godwit.io/service";
    /// Name of the user for looking up cached memory; the container's id by default.
    pub const USER: &str = "godwit.io/user";
    /// "yes" or "no": whether Multipath TCP is on in its network namespace, whatever the node's
    /// configuration says.
    pub const MPTCP: &str = "godwit.io/mptcp";
    /// What the settings of CRIU begin with; docs/shim.md lists them.
    pub const CRIU_PREFIX: &str = "godwit.io/criu.";
}

/// Paths that shim, daemon and command line must agree on without asking each other.
pub mod path {
    /// The daemon's control socket.
    pub const CONTROL_SOCKET: &str = "/run/godwit/control.sock";
    /// One file per released container, `NAMESPACE/ID`: a shim refuses to create what is named
    /// here. The file's text says where the container went: "moved to NODE, epoch N".
    pub const FENCES: &str = "/var/lib/godwit/fences";
    /// Where the file systems of block volumes are mounted for containers,
    /// `NAMESPACE/CONTAINER/VOLUME`. Not in a bundle nor in the daemon's run directory: containerd
    /// and systemd remove those with all that lies below.
    pub const MOUNTS: &str = "/run/godwit-volumes";
    /// FIFOs of terminals that the daemon made, `NAMESPACE/CONTAINER/{stdin,stdout}`. A shim
    /// discards the oldest output in them while no client reads it.
    pub const STREAMS: &str = "/run/godwit-streams";
    /// One file per container that is being restored for a migration, `NAMESPACE/CONTAINER`: how
    /// far it is, and what to end if its shim dies. On the machine's memory: the tasks do not
    /// survive it either.
    pub const HOLDS: &str = "/run/godwit-holds";
    /// Logs of CRIU that errors name: `NAMESPACE-CONTAINER.dump.log` and `.restore.log`, the last
    /// one of each container.
    pub const LOGS: &str = "/var/log/godwit";
    /// There while containers of this node are to have no Multipath TCP, unless their annotation
    /// says otherwise.
    pub const NO_MPTCP: &str = "/run/godwit/no-mptcp";
    /// File in a bundle that holds the shim's ttrpc address.
    pub const SHIM_ADDRESS_FILE: &str = "godwit-address";
}

/// Modules of code that a protocol compiler wrote: our rules are not its.
macro_rules! generated {
    ($($(#[$attribute:meta])* mod $name:ident { $($body:item)* })*) => {
        $(
            $(#[$attribute])*
            #[allow(
                missing_docs,
                unreachable_pub,
                clippy::all,
                clippy::pedantic,
                clippy::restriction,
                reason = "generated"
            )]
            pub mod $name { $($body)* }
        )*
    };
}

generated! {
    /// The shim's own service.
    mod shim {
        mod generated {
            include!(concat!(env!("OUT_DIR"), "/shim/mod.rs"));
        }
        pub use generated::{shim::*, shim_ttrpc::*};
    }

    /// The daemon's control service.
    mod control {
        mod generated {
            include!(concat!(env!("OUT_DIR"), "/control/mod.rs"));
        }
        pub use generated::{control::*, control_ttrpc::*};
    }

    /// The peer service between daemons.
    #[cfg(feature = "peer")]
    mod peer {
        tonic::include_proto!("godwit.peer.v1");
    }

    /// The part of etcd's API that the directory uses.
    #[cfg(feature = "peer")]
    mod etcd {
        tonic::include_proto!("etcdserverpb");
    }
}
