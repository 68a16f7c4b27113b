//! Generates the messages and services of `proto/`: ttrpc for the node's own sockets, gRPC between
//! nodes and to etcd.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    for service in ["shim", "control"] {
        let out = out.join(service);
        std::fs::create_dir_all(&out)?;
        Codegen::new()
            .out_dir(&out)
            .input(format!("proto/{service}.proto"))
            .include("proto")
            .rust_protobuf()
            .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
            .customize(Customize { async_all: true, ..Default::default() })
            .run()?;
        // The generators write one file each; neither names both.
        std::fs::write(
            out.join("mod.rs"),
            format!("pub mod {service};\npub mod {service}_ttrpc;\n"),
        )?;
    }
    if std::env::var_os("CARGO_FEATURE_PEER").is_some() {
        tonic_prost_build::configure()
            .bytes(".")
            .compile_protos(&["proto/peer.proto", "proto/etcd.proto"], &["proto"])?;
    }
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
