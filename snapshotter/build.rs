//! Generates the gRPC server of containerd's snapshots service.
//!
//! `containerd-client` has the service's messages but only clients. So the server is described here
//! by hand over those very types, and no .proto file is copied. The descriptions follow
//! containerd's `api/services/snapshots/v1/snapshots.proto`.

use tonic_build::manual::{Builder, Method, Service};

/// Name, Rust name, request, response and whether the response is a stream. A response without a
/// package is a path of this crate: `google.protobuf.Empty` is `()`, which the generator does not
/// take for a path.
const METHODS: &[(&str, &str, &str, &str, bool)] = &[
    ("Prepare", "prepare", "PrepareSnapshotRequest", "PrepareSnapshotResponse", false),
    ("View", "view", "ViewSnapshotRequest", "ViewSnapshotResponse", false),
    ("Mounts", "mounts", "MountsRequest", "MountsResponse", false),
    ("Commit", "commit", "CommitSnapshotRequest", "Empty", false),
    ("Remove", "remove", "RemoveSnapshotRequest", "Empty", false),
    ("Stat", "stat", "StatSnapshotRequest", "StatSnapshotResponse", false),
    ("Update", "update", "UpdateSnapshotRequest", "UpdateSnapshotResponse", false),
    ("List", "list", "ListSnapshotsRequest", "ListSnapshotsResponse", true),
    ("Usage", "usage", "UsageRequest", "UsageResponse", false),
    ("Cleanup", "cleanup", "CleanupRequest", "Empty", false),
];

fn type_path(message: &str) -> String {
    match message {
        "Empty" => "crate::api::snapshots::Empty".to_owned(),
        message => format!("::containerd_client::services::v1::snapshots::{message}"),
    }
}

fn main() {
    let mut service =
        Service::builder().name("Snapshots").package("containerd.services.snapshots.v1");
    for (name, rust_name, request, response, streams) in METHODS {
        let method = Method::builder()
            .name(*rust_name)
            .route_name(*name)
            .input_type(type_path(request))
            .output_type(type_path(response))
            .codec_path("::tonic_prost::ProstCodec");
        let method = if *streams { method.server_streaming() } else { method };
        service = service.method(method.build());
    }
    Builder::new().build_client(false).compile(&[service.build()]);
    println!("cargo:rerun-if-changed=build.rs");
}
