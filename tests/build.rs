//! Generates a client of the Kubernetes CRI, for the suite that drives pods.

/// A mark of fields for their logging, which compilers before protoc 22 do not know.
const UNKNOWN_TO_OLD_PROTOC: &str = " [debug_redact = true]";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let vendored = "../protos/vendor/cri/api.proto";
    println!("cargo:rerun-if-changed={vendored}");
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    let plain = std::fs::read_to_string(vendored)?.replace(UNKNOWN_TO_OLD_PROTOC, "");
    let copy = out.join("api.proto");
    std::fs::write(&copy, plain)?;
    tonic_prost_build::configure().build_server(false).compile_protos(&[copy], &[out])?;
    Ok(())
}
