//! What a newer version has beyond an older one.
//!
//! Two Merkle trees are walked side by side: equal digests end the walk there, so its cost is that
//! of the change. Each object of the newer version that the older one has not comes out once,
//! parents before children, together with the object that stood in its place: compressed against
//! that one, a list of which one digest changed costs some 40 bytes, and a page of which one word
//! changed costs little more than the word.

use std::collections::{HashMap, HashSet};

use godwit_protos::Digest;

use super::object::{self, Content, Image, Kind, Memory, Node, Pages, Tree};
use super::{ContentError, Source};

/// An object of the newer version, and what stood in its place in the older one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The object.
    pub digest: Digest,
    /// What it is.
    pub kind: Kind,
    /// The object in its place before, if there was one.
    pub base: Option<Digest>,
}

/// Calls `visit` for each object that `new` refers to and `base` does not, parents first, each
/// once.
///
/// - Without a `base`, that is every object of `new`.
/// - Errors: [`ContentError`] when an object that has to be looked into is missing or damaged, or
///   `visit`'s.
pub fn difference<S: Source>(
    source: &S,
    kind: Kind,
    new: Digest,
    base: Option<Digest>,
    visit: &mut dyn FnMut(Changed) -> Result<(), ContentError>,
) -> Result<(), ContentError> {
    let mut walk = Walk { source, visit, seen: HashSet::new() };
    walk.object(kind, new, base)
}

struct Walk<'a, S> {
    source: &'a S,
    visit: &'a mut dyn FnMut(Changed) -> Result<(), ContentError>,
    seen: HashSet<Digest>,
}

impl<S: Source> Walk<'_, S> {
    fn object(
        &mut self,
        kind: Kind,
        new: Digest,
        base: Option<Digest>,
    ) -> Result<(), ContentError> {
        if base == Some(new) || !self.seen.insert(new) {
            return Ok(());
        }
        (self.visit)(Changed { digest: new, kind, base })?;
        match kind {
            Kind::Chunk => Ok(()),
            Kind::Tree => self.tree(new, base),
            Kind::Directory => self.directory(new, base),
            Kind::Pieces | Kind::Cut | Kind::Layer => {
                let children = self.children(kind, new)?;
                let before = base.map(|base| self.children(kind, base)).transpose()?;
                self.lists(&children, &before.unwrap_or_default())
            }
            Kind::Pages => self.pages(new, base),
            Kind::Memory => self.memory(new, base),
            Kind::Image => self.image(new, base),
        }
    }

    fn children(&self, kind: Kind, digest: Digest) -> Result<Vec<(Kind, Digest)>, ContentError> {
        object::children(kind, &self.source.object(&digest)?)
            .map_err(|source| ContentError::Object { digest, source })
    }

    /// Lists whose common elements keep their order: what is new between two common ones stood
    /// where the older list has something else between them.
    fn lists(
        &mut self,
        new: &[(Kind, Digest)],
        before: &[(Kind, Digest)],
    ) -> Result<(), ContentError> {
        let places: HashMap<Digest, usize> =
            before.iter().enumerate().map(|(place, (_, digest))| (*digest, place)).collect();
        let mut place = 0;
        for (kind, digest) in new {
            if let Some(known) = places.get(digest) {
                place = known + 1;
                continue;
            }
            let base = before.get(place).map(|(_, base)| *base);
            self.object(*kind, *digest, base)?;
            place += 1;
        }
        Ok(())
    }

    fn tree(&mut self, new: Digest, base: Option<Digest>) -> Result<(), ContentError> {
        let new: Tree = self.source.decode(&new)?;
        let base = base.map(|base| self.source.decode::<Tree>(&base)).transpose()?;
        self.object(Kind::Directory, new.root, base.map(|base| base.root))
    }

    fn directory(&mut self, new: Digest, base: Option<Digest>) -> Result<(), ContentError> {
        let children = self.children(Kind::Directory, new)?;
        let parts = |children: &[(Kind, Digest)], source: &S, of: &Digest| {
            let parted = matches!(source.decode(of), Ok(object::Directory::Parts(_)));
            if parted { children.to_vec() } else { Vec::new() }
        };
        let new_parts = parts(&children, self.source, &new);
        // The parts themselves are objects; what they hold is compared by name across all of them.
        if let Some(base) = base {
            let before = self.children(Kind::Directory, base)?;
            let before = parts(&before, self.source, &base);
            let known: HashSet<Digest> = before.iter().map(|(_, part)| *part).collect();
            for (place, (kind, part)) in new_parts.iter().enumerate() {
                if !known.contains(part) && self.seen.insert(*part) {
                    let base = before.get(place).map(|(_, base)| *base);
                    (self.visit)(Changed { digest: *part, kind: *kind, base })?;
                }
            }
        } else {
            for (kind, part) in &new_parts {
                if self.seen.insert(*part) {
                    (self.visit)(Changed { digest: *part, kind: *kind, base: None })?;
                }
            }
        }
        let before: HashMap<_, _> = match base {
            Some(base) => self.source.entries(&base)?,
            None => Vec::new(),
        }
        .into_iter()
        .map(|entry| (entry.name, entry.node))
        .collect();
        for entry in self.source.entries(&new)? {
            match (&entry.node, before.get(&entry.name)) {
                (Node::Directory(new), Some(Node::Directory(base))) => {
                    self.object(Kind::Directory, *new, Some(*base))?;
                }
                (Node::Directory(new), _) => self.object(Kind::Directory, *new, None)?,
                (Node::File(_, new), Some(Node::File(_, base))) => self.file(new, Some(base))?,
                (Node::File(_, new), _) => self.file(new, None)?,
                (
                    Node::HardLink(..)
                    | Node::Symlink(_)
                    | Node::CharDevice(..)
                    | Node::BlockDevice(..)
                    | Node::Fifo
                    | Node::Socket,
                    _,
                ) => {}
            }
        }
        Ok(())
    }

    fn file(&mut self, new: &Content, base: Option<&Content>) -> Result<(), ContentError> {
        if base == Some(new) {
            return Ok(());
        }
        let children = |content: &Content| -> Vec<(Kind, Digest)> {
            match content {
                Content::Blocks(blocks) => {
                    blocks.iter().map(|block| (Kind::Pieces, *block)).collect()
                }
                Content::Pieces(pieces) => pieces
                    .iter()
                    .filter_map(|piece| piece.chunk)
                    .map(|chunk| (Kind::Chunk, chunk))
                    .collect(),
            }
        };
        // A file that grew from a few pieces into blocks has no list to compare with, but its
        // chunks are known.
        let same_form =
            base.filter(|base| std::mem::discriminant(*base) == std::mem::discriminant(new));
        if let (Some(base), None) = (base, same_form) {
            for piece in self.source.pieces(base)? {
                self.seen.extend(piece.chunk);
            }
        }
        self.lists(&children(new), &same_form.map(children).unwrap_or_default())
    }

    fn pages(&mut self, new: Digest, base: Option<Digest>) -> Result<(), ContentError> {
        let new: Pages = self.source.decode(&new)?;
        let before: HashMap<u8, Digest> = match base {
            Some(base) => {
                let base: Pages = self.source.decode(&base)?;
                base.slots.into_iter().zip(base.pages).collect()
            }
            None => HashMap::new(),
        };
        for (slot, page) in new.slots.iter().zip(new.pages) {
            self.object(Kind::Chunk, page, before.get(slot).copied())?;
        }
        Ok(())
    }

    fn image(&mut self, new: Digest, base: Option<Digest>) -> Result<(), ContentError> {
        let new: Image = self.source.decode(&new)?;
        let base = base.map(|base| self.source.decode::<Image>(&base)).transpose()?;
        let before = base.map(|base| base.blocks).unwrap_or_default();
        for (index, block) in new.blocks.iter().enumerate() {
            self.object(Kind::Pieces, *block, before.get(index).copied())?;
        }
        Ok(())
    }

    fn memory(&mut self, new: Digest, base: Option<Digest>) -> Result<(), ContentError> {
        let new: Memory = self.source.decode(&new)?;
        let base = base.map(|base| self.source.decode::<Memory>(&base)).transpose()?;
        if let Some(images) = new.images {
            let before = base.as_ref().and_then(|base| base.images);
            self.object(Kind::Tree, images, before)?;
        }
        let before: HashMap<(&str, u64), Digest> = base
            .iter()
            .flat_map(|base| &base.maps)
            .flat_map(|map| {
                let places = map.numbers.iter().map(|number| (map.name.as_str(), *number));
                places.zip(map.blocks.iter().copied())
            })
            .collect();
        for map in &new.maps {
            for (number, block) in map.numbers.iter().zip(&map.blocks) {
                let base = before.get(&(map.name.as_str(), *number)).copied();
                self.object(Kind::Pages, *block, base)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::capture::{Unchanged, capture};
    use crate::content::fake::Objects;
    use std::fs;
    use std::path::Path;

    fn take(root: &Path, objects: &mut Objects) -> Digest {
        capture(root, objects, &mut Unchanged::default()).unwrap().tree
    }

    fn changed(objects: &Objects, new: Digest, base: Option<Digest>) -> Vec<Changed> {
        let mut all = Vec::new();
        difference(objects, Kind::Tree, new, base, &mut |one| {
            all.push(one);
            Ok(())
        })
        .unwrap();
        all
    }

    /// Method: a node that holds the base and receives the difference holds everything.
    #[test]
    fn base_and_difference_together_are_the_new_version() {
        let from = tempfile::tempdir().unwrap();
        let mut noise = vec![0u8; 4 << 20];
        let mut state = 1u64;
        for byte in &mut noise {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (state >> 56) as u8;
        }
        fs::create_dir(from.path().join("d")).unwrap();
        fs::write(from.path().join("d/large"), &noise).unwrap();
        fs::write(from.path().join("same"), b"same").unwrap();
        for n in 0..700 {
            fs::write(from.path().join(format!("many-{n}")), n.to_string()).unwrap();
        }
        let mut here = Objects::default();
        let base = take(from.path(), &mut here);
        let mut there = here.clone();
        noise.splice(1 << 20..1 << 20, *b"an insertion");
        fs::write(from.path().join("d/large"), &noise).unwrap();
        fs::write(from.path().join("many-500"), b"changed").unwrap();
        let new = take(from.path(), &mut here);

        let changes = changed(&here, new, Some(base));
        for change in &changes {
            there.0.insert(change.digest, here.object(&change.digest).unwrap());
            if let Some(base) = change.base {
                assert!(there.0.contains_key(&base), "a base that the destination lacks");
            }
        }
        let mut all = 0;
        difference(&there, Kind::Tree, new, None, &mut |one| {
            all += 1;
            there.object(&one.digest).map(drop)
        })
        .unwrap();
        let chunks = changes.iter().filter(|one| one.kind == Kind::Chunk).count();
        assert!(chunks <= 5, "an insertion costs its neighbourhood, not {chunks} chunks");
        assert!(all > 10 * changes.len());
    }

    #[test]
    fn equal_versions_have_no_difference() {
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("a"), b"a").unwrap();
        let mut objects = Objects::default();
        let tree = take(from.path(), &mut objects);
        assert_eq!(changed(&objects, tree, Some(tree)), []);
    }
}
