//! Link remaps: how CRIU's images name an open file whose own name was removed while another hard
//! link is left.
//!
//! CRIU opens files by path. For such a file a dump makes the hard link `link_remap.N` beside the
//! removed name, and the images refer to that. When the container lives on, CRIU removes the link
//! at the end of the dump. A restore opens the file by the link, which must be there again, and
//! then removes it.
//!
//! `remap-fpath.img` has pairs of file ids, `files.img` the path of each id. Both come from CRIU on
//! this node; what cannot be read is an error, and nothing is allocated by an announced length.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::image::{self, Kind};
use crate::pagemap::ImageError;

/// Longest message, in bytes. A path is the largest part of one.
const MESSAGE_BYTES_MAX: u32 = 1 << 20;

/// `remap_type` of a hard link.
const LINKED: i32 = 0;

/// A hard link that a restore needs. Paths are those of the container's mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkRemap {
    /// The name that was removed.
    pub removed: PathBuf,
    /// The link.
    pub link: PathBuf,
}

/// `remap_file_path_entry` of CRIU's images/remap-file-path.proto.
#[derive(Clone, PartialEq, prost::Message)]
struct Remap {
    #[prost(uint32, required, tag = "1")]
    orig_id: u32,
    #[prost(uint32, required, tag = "2")]
    remap_id: u32,
    #[prost(int32, optional, tag = "3")]
    remap_type: Option<i32>,
}

/// `file_entry` of CRIU's images/fdinfo.proto, as far as it is of use here.
#[derive(Clone, PartialEq, prost::Message)]
struct FileEntry {
    #[prost(uint32, required, tag = "2")]
    id: u32,
    #[prost(message, optional, tag = "3")]
    regular: Option<Regular>,
}

/// `reg_file_entry` of CRIU's images/regfile.proto.
#[derive(Clone, PartialEq, prost::Message)]
struct Regular {
    #[prost(bytes = "vec", required, tag = "6")]
    name: Vec<u8>,
}

/// The links that the images in `directory` refer to.
///
/// Errors: [`ImageError`] when an image cannot be read, breaks its format, or lacks a file that the
/// other one names.
pub fn link_remaps(directory: &Path) -> Result<Vec<LinkRemap>, ImageError> {
    // CRIU makes the image when it has something to write into it.
    let remaps: Vec<Remap> = match read(directory, "remap-fpath", Kind::Remaps) {
        Err(ImageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(Vec::new());
        }
        remaps => remaps?,
    };
    let linked = |remap: &Remap| remap.remap_type.unwrap_or(LINKED) == LINKED;
    let remaps: Vec<Remap> = remaps.into_iter().filter(linked).collect();
    if remaps.is_empty() {
        return Ok(Vec::new());
    }
    let files: Vec<FileEntry> = read(directory, "files", Kind::Files)?;
    let paths: HashMap<u32, PathBuf> =
        files.into_iter().filter_map(|file| Some((file.id, path(&file.regular?.name)))).collect();
    let path = |id| {
        let rule = "a remapped file is not in files.img";
        let malformed =
            || ImageError::Malformed { name: "remap-fpath".to_owned(), offset: 0, rule };
        paths.get(&id).cloned().ok_or_else(malformed)
    };
    let link = |remap: &Remap| {
        Ok(LinkRemap { removed: path(remap.orig_id)?, link: path(remap.remap_id)? })
    };
    remaps.iter().map(link).collect()
}

/// Protobuf's strings are UTF-8 and the kernel's names are not, so CRIU writes the bytes as they
/// are.
fn path(name: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt as _;
    PathBuf::from(std::ffi::OsStr::from_bytes(name))
}

/// All messages of an image.
fn read<M: prost::Message + Default>(
    directory: &Path,
    name: &str,
    kind: Kind,
) -> Result<Vec<M>, ImageError> {
    let path = directory.join(format!("{name}.img"));
    let bytes = fs::read(&path).map_err(ImageError::io("read", &path))?;
    let broken = ImageError::broken(name);
    let mut decoded = Vec::new();
    for framed in image::messages(&bytes, kind, MESSAGE_BYTES_MAX).map_err(&broken)? {
        let image::Framed { offset, message } = framed.map_err(&broken)?;
        let rule = "a message is no protobuf";
        decoded.push(M::decode(message).map_err(|_cause| broken(image::Broken { offset, rule }))?);
    }
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(kind: Kind, messages: &[&[u8]]) -> Vec<u8> {
        let mut bytes = image::empty(kind);
        for message in messages {
            image::push(&mut bytes, message);
        }
        bytes
    }

    /// `files.img` with file 1, "/d/a", file 7, "/d/link_remap.7", and a socket.
    fn files() -> Vec<u8> {
        let (a, link) = (
            b"\x08\x01\x10\x01\x1a\x06\x32\x04/d/a",
            b"\x08\x01\x10\x07\x1a\x11\x32\x0f/d/link_remap.7",
        );
        written(Kind::Files, &[a, link, b"\x08\x04\x10\x02\x22\x00"])
    }

    #[test]
    fn links_are_found_and_files_without_any_name_are_not() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(link_remaps(directory.path()).unwrap(), []);
        // File 2 is a ghost: its content is in an image of its own.
        let remaps: [&[u8]; 2] = [b"\x08\x01\x10\x07\x18\x00", b"\x08\x02\x10\x09\x18\x01"];
        fs::write(directory.path().join("remap-fpath.img"), written(Kind::Remaps, &remaps))
            .unwrap();
        fs::write(directory.path().join("files.img"), files()).unwrap();
        let link = LinkRemap { removed: "/d/a".into(), link: "/d/link_remap.7".into() };
        assert_eq!(link_remaps(directory.path()).unwrap(), [link]);
    }

    #[test]
    fn images_that_do_not_fit_together_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let remaps = directory.path().join("remap-fpath.img");
        fs::write(directory.path().join("files.img"), files()).unwrap();
        for (bytes, rule) in [
            (written(Kind::Remaps, &[b"\x08\x01\x10\x09"]), "is not in files.img"),
            (written(Kind::Files, &[]), "another image's"),
            (written(Kind::Remaps, &[b"\x08"]), "no protobuf"),
            ([written(Kind::Remaps, &[]), vec![9, 0, 0, 0, 1]].concat(), "cut off"),
        ] {
            fs::write(&remaps, bytes).unwrap();
            let error = link_remaps(directory.path()).unwrap_err().to_string();
            assert!(error.contains(rule), "{error}");
        }
    }
}
