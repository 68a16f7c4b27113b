//! Unusual mappings.

use anyhow::Result;

use crate::bed::{self, destination, probe, source};
use crate::table::rows;

rows! {
    a_reservation_larger_than_memory_moves:
        "address space reserved beyond memory and swap, without `MAP_NORESERVE`", Moves,
        "the mapping has `MAP_NORESERVE` afterwards" => reservation();
}

fn reservation() -> Result<()> {
    let name = "reservation";
    bed::start(&probe(name, &["reservation", "400"]))?;
    bed::status_becomes(source(), name, |line| line.ends_with("right"))?;
    bed::moved(name)?;
    let line = bed::status(destination(), name)?;
    bed::status_becomes(destination(), name, |now| now != line && now.ends_with("right"))?;
    bed::remove(destination(), name)
}
