//! A child directory and its parent give the same memory as the dump they were made from.
//!
//! The dump is made up here; `GODWIT_DUMP_DIR` names a real one instead, and `GODWIT_SPLIT_DIR`
//! where to leave the two directories for `runc restore --image-path .../child`.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use criu_wrapper::pagemap::{
    Form, ImageDirectory, PAGE_BYTES, PRESENT, PagemapFile, PagemapWriter, link_parent,
};

fn env_dir(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from)
}

fn made_up_dump(dir: &Path) {
    for (name, pages_id, base) in [("pagemap-1", 1, 0x40_0000), ("pagemap-shmem-7", 2, 0)] {
        let mut writer = PagemapWriter::create(dir, name, pages_id, Form::Narrow).unwrap();
        for run in 0..40_u64 {
            let pages = run % 7 + 1;
            let bytes: Vec<u8> = (0..pages).flat_map(|page| page_bytes(run * 100 + page)).collect();
            writer.present(base + run * 16 * PAGE_BYTES, PRESENT, &bytes).unwrap();
        }
        writer.finish().unwrap();
    }
    fs::write(dir.join("inventory.img"), b"inventory").unwrap();
}

fn page_bytes(seed: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    for (word, place) in bytes.chunks_exact_mut(8).enumerate() {
        place.copy_from_slice(&(seed * 1000 + word as u64).to_le_bytes());
    }
    bytes
}

/// Every page of one page map, by address; pages of the parent are looked up there.
fn memory(images: &ImageDirectory, map: &PagemapFile) -> HashMap<u64, Vec<u8>> {
    let parent = images.parent().map(|link| {
        let parent = ImageDirectory::open(&images.path().join(link)).unwrap();
        let map = parent.pagemap(&map.name).unwrap();
        memory(&parent, &map)
    });
    let file = File::open(images.pages_path(map.pages_id)).unwrap();
    let mut memory = HashMap::new();
    for (run, offset) in map.places() {
        for page in 0..run.pages {
            let vaddr = run.vaddr + page * PAGE_BYTES;
            let bytes = match offset {
                Some(offset) => {
                    let mut bytes = vec![0; 4096];
                    file.read_exact_at(&mut bytes, offset + page * PAGE_BYTES).unwrap();
                    bytes
                }
                None => parent.as_ref().unwrap()[&vaddr].clone(),
            };
            memory.insert(vaddr, bytes);
        }
    }
    memory
}

/// Splits `dump`: nine pages of ten are staged in `parent`, which also has stale copies of some
/// others.
fn split(dump: &ImageDirectory, map: &PagemapFile, parent: &Path, child: &Path) {
    let file = File::open(dump.pages_path(map.pages_id)).unwrap();
    let (id, form) = (map.pages_id, map.form);
    let mut staged = PagemapWriter::create(parent, &map.name, id, form).unwrap();
    let mut changed = PagemapWriter::create(child, &map.name, id, form).unwrap();
    for (run, offset) in map.places() {
        let offset = offset.unwrap();
        for page in 0..run.pages {
            let vaddr = run.vaddr + page * PAGE_BYTES;
            let mut bytes = vec![0; 4096];
            file.read_exact_at(&mut bytes, offset + page * PAGE_BYTES).unwrap();
            match (vaddr / PAGE_BYTES) % 10 {
                0 => changed.present(vaddr, run.flags, &bytes).unwrap(),
                1 => {
                    changed.present(vaddr, run.flags, &bytes).unwrap();
                    staged.present(vaddr, PRESENT, &[0xee; 4096]).unwrap();
                }
                _ => {
                    changed.in_parent(vaddr, 1).unwrap();
                    staged.present(vaddr, PRESENT, &bytes).unwrap();
                }
            }
        }
    }
    staged.finish().unwrap();
    changed.finish().unwrap();
}

#[test]
fn a_dump_split_into_parent_and_child_gives_the_same_memory() {
    let scratch = tempfile::tempdir().unwrap();
    let dump = env_dir("GODWIT_DUMP_DIR").unwrap_or_else(|| {
        made_up_dump(scratch.path());
        scratch.path().to_owned()
    });
    let two = tempfile::tempdir().unwrap();
    let two = env_dir("GODWIT_SPLIT_DIR").unwrap_or_else(|| two.path().to_owned());
    let (parent, child) = (two.join("parent-dir"), two.join("child"));
    fs::create_dir_all(&parent).unwrap();
    fs::create_dir_all(&child).unwrap();
    let dump = ImageDirectory::open(&dump).unwrap();
    for map in dump.pagemaps().unwrap() {
        let recorded = fs::read(dump.path().join(format!("{}.img", map.name))).unwrap();
        assert_eq!(map.to_bytes(), recorded, "{}: written back byte for byte", map.name);
        split(&dump, &map, &parent, &child);
    }
    for file in dump.other_files() {
        fs::copy(dump.path().join(&file), child.join(&file)).unwrap();
    }
    link_parent(&child, Path::new("../parent-dir")).unwrap();
    let child = ImageDirectory::open(&child).unwrap();
    assert_eq!(child.other_files(), dump.other_files());
    for (before, after) in dump.pagemaps().unwrap().iter().zip(child.pagemaps().unwrap()) {
        assert!(memory(&dump, before) == memory(&child, &after), "{}", before.name);
    }
}
