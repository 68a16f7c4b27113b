//! Pages without the addresses that differ from process to process.
//!
//! Linux puts programs, libraries, heap and stacks elsewhere in every process, so pages of two
//! containers of one image that hold pointers differ although they say the same. Before a page is
//! hashed, each word of it that lies in a mapping is replaced by an *alias*: an address beyond what
//! processes can have, that follows from the mapping's name and the offset in it. Pages that differ
//! in nothing else then have one digest, and a sibling's snapshot serves them.
//!
//! A page is turned back with the table that it was made with, which is part of its
//! [`super::object::Memory`]. As a word that happens to lie in an alias becomes the address that it
//! stands for, the same replacement leads there and back, whatever the page holds and however wrong
//! the table is: a table is never needed to be right, only to be kept.

use std::collections::{HashMap, HashSet};

use criu_wrapper::live::Mapping;
use godwit_protos::Digest;
use serde::{Deserialize, Serialize};

/// Most areas of an address space that get aliases. What lies beyond keeps its addresses.
pub const AREAS_MAX: usize = 4096;

/// Aliases lie from here ...
const ALIAS_MIN: u64 = 1 << 62;

/// ... up to here: no process has addresses there on any architecture that Godwit runs on.
const ALIAS_END: u64 = 1 << 63;

/// Room for each area: what is longer keeps its addresses. The rest of an alias tells areas apart.
const AREA_BYTES_MAX: u64 = 1 << 41;

/// Below this a word is more often a small number or a compressed pointer, which no one moves.
const ADDRESS_MIN: u64 = 1 << 32;

const WORD_BYTES: usize = 8;

/// An area of an address space and its alias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// Its first address.
    pub start: u64,
    /// The address behind its last.
    pub end: u64,
    /// What stands for its first address.
    pub alias: u64,
}

impl Area {
    fn alias_end(&self) -> u64 {
        self.alias + (self.end - self.start)
    }
}

/// The areas of an address space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Aliases {
    /// Each stretch of words that is replaced: first, behind the last, and what stands for the
    /// first; ascending.
    stretches: Vec<(u64, u64, u64)>,
    areas: Vec<Area>,
}

impl Aliases {
    /// The aliases of a process with these mappings, ascending.
    ///
    /// A file's mappings and the nameless ones that touch them move together: they are one area,
    /// named by the file and how many areas of that name come before. Other nameless mappings are
    /// named by what comes before them.
    pub fn of(mappings: &[Mapping]) -> Self {
        let mut areas: Vec<(Area, &str)> = Vec::new();
        let (mut times, mut taken, mut last_named) = (HashMap::new(), HashSet::new(), "");
        let mut begin = |name: &str, is_named: bool| {
            let time: &mut u32 = times.entry((name.to_owned(), is_named)).or_default();
            *time += 1;
            let digest = Digest::of(format!("{name}|{is_named}|{time}").as_bytes());
            let number =
                digest.as_bytes().first_chunk().map_or(0, |eight| u64::from_le_bytes(*eight));
            ALIAS_MIN + number % ((ALIAS_END - ALIAS_MIN) / AREA_BYTES_MAX) * AREA_BYTES_MAX
        };
        let usual = |mapping: &&Mapping| mapping.start >= ADDRESS_MIN && mapping.end <= ALIAS_MIN;
        for mapping in mappings.iter().filter(usual) {
            let name = mapping.name.as_str();
            if let Some((area, of)) = areas.last_mut()
                && ((name.is_empty() && mapping.start == area.end)
                    || (!name.is_empty() && name == *of))
            {
                area.end = mapping.end;
                continue;
            }
            if !name.is_empty() {
                last_named = name;
            }
            let alias = begin(last_named, !name.is_empty());
            areas.push((Area { start: mapping.start, end: mapping.end, alias }, name));
        }
        areas.retain(|(area, _)| {
            area.end - area.start <= AREA_BYTES_MAX && taken.insert(area.alias)
        });
        areas.truncate(AREAS_MAX);
        Self::new(areas.into_iter().map(|(area, _)| area).collect()).unwrap_or_default()
    }

    /// Aliases that came from elsewhere. `None` if the replacement would not lead back: areas
    /// ascend, neither they nor their aliases overlap, and no alias is an address.
    pub fn new(areas: Vec<Area>) -> Option<Self> {
        let fits = |area: &Area| {
            area.start < area.end
                && area.end <= ALIAS_MIN
                && area.end - area.start <= AREA_BYTES_MAX
                && area.alias >= ALIAS_MIN
                && area.alias <= ALIAS_END - AREA_BYTES_MAX
        };
        if areas.len() > AREAS_MAX || !areas.iter().all(fits) {
            return None;
        }
        let there = areas.iter().map(|area| (area.start, area.end, area.alias));
        let mut back: Vec<_> =
            areas.iter().map(|area| (area.alias, area.alias_end(), area.start)).collect();
        back.sort_unstable();
        let stretches: Vec<_> = there.chain(back).collect();
        let is_disjoint = stretches.is_sorted_by(|one, next| one.1 <= next.0);
        is_disjoint.then_some(Self { stretches, areas })
    }

    /// The areas, ascending.
    pub fn areas(&self) -> &[Area] {
        &self.areas
    }

    /// Replaces every word of a page that lies in an area by its alias, and every alias by its
    /// address. Twice leads back.
    pub fn replace(&self, page: &mut [u8]) {
        let (Some(first), Some(last)) = (self.stretches.first(), self.stretches.last()) else {
            return;
        };
        for bytes in page.as_chunks_mut::<WORD_BYTES>().0 {
            let word = u64::from_le_bytes(*bytes);
            if word < first.0 || word >= last.1 {
                continue;
            }
            let at = self.stretches.partition_point(|(start, ..)| *start <= word);
            let Some((start, end, other)) = at.checked_sub(1).and_then(|at| self.stretches.get(at))
            else {
                continue;
            };
            if word < *end {
                *bytes = (other + (word - start)).to_le_bytes();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mapping(start: u64, end: u64, name: &str) -> Mapping {
        let name = name.to_owned();
        Mapping { start, end, name, ..Mapping::default() }
    }

    /// A process whose library and stack lie elsewhere than another's.
    fn process(library: u64, stack: u64) -> Aliases {
        Aliases::of(&[
            mapping(0x1000, 0x2000, "/bin/program"),
            mapping(library, library + 0x2000, "/lib/library.so"),
            mapping(library + 0x3000, library + 0x4000, "/lib/library.so"),
            mapping(library + 0x4000, library + 0x6000, ""),
            mapping(stack, stack + 0x8000, "[stack]"),
            mapping(0xffff_ffff_ff60_0000, 0xffff_ffff_ff60_1000, "[vsyscall]"),
        ])
    }

    fn page(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn pages_that_differ_in_addresses_alone_are_one() {
        let (one, other) = (
            process(0x7f00_0000_0000, 0x7ffc_0000_0000),
            process(0x7e00_1000_0000, 0x7ffd_0000_1000),
        );
        let mut first = page(&[7, 0x7f00_0000_5008, 0x7ffc_0000_0010, 0x7f00_0000_2500]);
        let mut second = page(&[7, 0x7e00_1000_5008, 0x7ffd_0000_1010, 0x7e00_1000_2500]);
        let (before, kept) = (first.clone(), second.clone());
        one.replace(&mut first);
        other.replace(&mut second);
        assert_eq!(first, second);
        assert_ne!(first, before);
        one.replace(&mut first);
        other.replace(&mut second);
        assert_eq!((first, second), (before, kept));
    }

    #[test]
    fn what_is_no_address_stays() {
        let aliases = process(0x7f00_0000_0000, 0x7ffc_0000_0000);
        let before = page(&[0, 1, 0x1500, 0x7eff_ffff_ffff, 0x7f00_0000_6000, u64::MAX, 1 << 63]);
        let mut after = before.clone();
        aliases.replace(&mut after);
        assert_eq!(after, before);
        Aliases::default().replace(&mut after);
        assert_eq!(after, before);
    }

    #[test]
    fn tables_that_would_not_lead_back_are_refused() {
        let area = |start, end, alias| Area { start, end, alias };
        let (a, b) = (ALIAS_MIN, ALIAS_MIN + AREA_BYTES_MAX);
        assert!(Aliases::new(vec![area(10, 20, a), area(20, 30, b)]).is_some());
        for (bad, why) in [
            (vec![area(10, 10, a)], "empty"),
            (vec![area(20, 10, a)], "backwards"),
            (vec![area(10, 20, a), area(19, 30, b)], "overlap"),
            (vec![area(20, 30, a), area(10, 15, b)], "descend"),
            (vec![area(10, 20, a), area(20, 30, a + 5)], "aliases overlap"),
            (vec![area(10, 20, 20)], "an alias that is an address"),
            (vec![area(10, 20, ALIAS_END - 1)], "an alias beyond the end"),
            (vec![area(0, AREA_BYTES_MAX + 1, a)], "too long"),
            (vec![area(10, u64::MAX, a)], "an address that is an alias"),
        ] {
            assert_eq!(Aliases::new(bad), None, "{why}");
        }
        let many = (0..=AREAS_MAX as u64).map(|at| area(2 * at, 2 * at + 1, a + at)).collect();
        assert_eq!(Aliases::new(many), None, "too many");
    }

    proptest! {
        #[test]
        fn twice_leads_back_whatever_the_page_holds(
            gaps in prop::collection::vec((1u64..1 << 20, 1u64..1 << 20, any::<bool>()), 0..20),
            words in prop::collection::vec((any::<prop::sample::Index>(), 0u64..1 << 21, any::<u64>()), 0..64),
        ) {
            let (mut at, mut mappings) = (1 << 40, Vec::new());
            for (gap, length, is_named) in gaps {
                let (start, name) = (at + gap * 4096, if is_named { "/lib/x" } else { "" });
                at = start + length * 4096;
                mappings.push(mapping(start, at, name));
            }
            let aliases = Aliases::of(&mappings);
            prop_assert_eq!(Aliases::new(aliases.areas().to_vec()), Some(aliases.clone()));
            let near = |(index, offset, other): (prop::sample::Index, u64, u64)| {
                if aliases.stretches.is_empty() { return other }
                let (start, ..) = aliases.stretches[index.index(aliases.stretches.len())];
                start.wrapping_add(offset).wrapping_sub(1 << 20)
            };
            let before = page(&words.into_iter().map(near).collect::<Vec<_>>());
            let mut after = before.clone();
            aliases.replace(&mut after);
            aliases.replace(&mut after);
            prop_assert_eq!(after, before);
        }
    }
}
