//! The runtime options of a task, which reach the shim in three shapes: none at all,
//! `containerd.runc.v1.Options` (ctr, or the exact runtime name of containerd's own shim), or
//! `runtimeoptions.v1.Options`, which the CRI plugin sends to every other runtime and whose
//! `config_body` is the TOML of the runtime's options table.

use std::path::{Path, PathBuf};

use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{CodedInputStream, Message as _, rt::WireType};
use containerd_shim::protos::shim::oci::Options as RuncOptions;

/// Largest TOML table that is read, in bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Why options cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OptionsError {
    #[error("runtime options of type {0:?} are not understood")]
    Unknown(String),
    #[error("runtime options cannot be decoded")]
    Decode(#[from] protobuf::Error),
    #[error("the runtime's options table is not valid TOML")]
    Toml(#[from] toml::de::Error),
    #[error("runtime options file {path}")]
    Read { path: PathBuf, source: std::io::Error },
}

/// The options table as the CRI plugin's configuration spells it.
#[derive(Default, serde::Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Table {
    no_pivot_root: bool,
    no_new_keyring: bool,
    shim_cgroup: String,
    io_uid: u32,
    io_gid: u32,
    binary_name: String,
    root: String,
    systemd_cgroup: bool,
    criu_image_path: String,
    criu_work_path: String,
}

impl From<Table> for RuncOptions {
    fn from(table: Table) -> Self {
        Self {
            no_pivot_root: table.no_pivot_root,
            no_new_keyring: table.no_new_keyring,
            shim_cgroup: table.shim_cgroup,
            io_uid: table.io_uid,
            io_gid: table.io_gid,
            binary_name: table.binary_name,
            root: table.root,
            systemd_cgroup: table.systemd_cgroup,
            criu_image_path: table.criu_image_path,
            criu_work_path: table.criu_work_path,
            ..Default::default()
        }
    }
}

/// Decodes task options of any shape.
///
/// Errors: [`OptionsError::Unknown`] for another type, the others for a damaged one.
pub(crate) fn decode(any: Option<&Any>) -> Result<RuncOptions, OptionsError> {
    let Some(any) = any.filter(|any| !any.type_url.is_empty()) else {
        return Ok(RuncOptions::default());
    };
    match any.type_url.rsplit('/').next().unwrap_or_default() {
        "containerd.runc.v1.Options" => Ok(RuncOptions::parse_from_bytes(&any.value)?),
        "runtimeoptions.v1.Options" => from_runtime_options(&any.value),
        other => Err(OptionsError::Unknown(other.to_owned())),
    }
}

/// `runtimeoptions.v1.Options`: type_url = 1, config_path = 2, config_body = 3.
fn from_runtime_options(bytes: &[u8]) -> Result<RuncOptions, OptionsError> {
    let (mut path, mut body) = (String::new(), Vec::new());
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let delimited = tag & 7 == WireType::LengthDelimited as u32;
        match tag >> 3 {
            2 if delimited => path = input.read_string()?,
            3 if delimited => body = input.read_bytes()?,
            _ => {
                let wire = WireType::new(tag & 7).unwrap_or(WireType::EndGroup);
                input.skip_field(wire)?;
            }
        }
    }
    if body.is_empty() && !path.is_empty() {
        body = read_capped(Path::new(&path))?;
    }
    let table: Table = toml::from_str(&String::from_utf8_lossy(&body))?;
    Ok(table.into())
}

fn read_capped(path: &Path) -> Result<Vec<u8>, OptionsError> {
    use std::io::Read as _;
    let wrong = |source| OptionsError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(wrong)?;
    file.take(CONFIG_BYTES_MAX).read_to_end(&mut bytes).map_err(wrong)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any { type_url: type_url.to_owned(), value, ..Default::default() }
    }

    #[test]
    fn no_options_are_the_defaults() {
        assert_eq!(decode(None).unwrap(), RuncOptions::default());
        assert_eq!(decode(Some(&Any::new())).unwrap(), RuncOptions::default());
    }

    #[test]
    fn runc_options_are_taken_as_they_are() {
        let sent = RuncOptions { binary_name: "crun".to_owned(), ..Default::default() };
        let bytes = sent.write_to_bytes().unwrap();
        assert_eq!(decode(Some(&any("containerd.runc.v1.Options", bytes))).unwrap(), sent);
    }

    /// Method: the bytes that the CRI plugin sends, written out.
    #[test]
    fn cri_options_come_as_toml() {
        let body = b"BinaryName = \"/usr/bin/crun\"\nSystemdCgroup = true\n";
        let mut bytes = vec![0x0a, 1, b'x', 0x1a, u8::try_from(body.len()).unwrap()];
        bytes.extend_from_slice(body);
        let options = decode(Some(&any("runtimeoptions.v1.Options", bytes))).unwrap();
        assert_eq!((options.binary_name.as_str(), options.systemd_cgroup), ("/usr/bin/crun", true));
    }

    #[test]
    fn other_types_and_damage_are_errors() {
        assert!(matches!(decode(Some(&any("a.B", vec![]))), Err(OptionsError::Unknown(_))));
        let damaged = any("runtimeoptions.v1.Options", vec![0x1a, 200]);
        assert!(matches!(decode(Some(&damaged)), Err(OptionsError::Decode(_))));
        let not_toml = any("runtimeoptions.v1.Options", vec![0x1a, 2, b'=', b'=']);
        assert!(matches!(decode(Some(&not_toml)), Err(OptionsError::Toml(_))));
    }
}
