//! What moves and what is refused: every row of the table in docs/moves.md is tried here on real
//! nodes.
//!
//! A row is a thing that a container may have and what becomes of it: it moves, or `plan` and
//! `migrate` refuse it before the freeze. The rows of one subject stand in one module below
//! `moves/`, each with the test that tries it ([`table::rows`]). The table in the document is made
//! of them: `GODWIT_WRITE_TABLE=1 make test-moves` rewrites it, and a test compares it.

#[path = "moves/attributes.rs"]
mod attributes;
#[path = "moves/basics.rs"]
mod basics;
#[path = "moves/bed.rs"]
mod bed;
#[path = "moves/clocks.rs"]
mod clocks;
#[path = "moves/files.rs"]
mod files;
#[path = "moves/image.rs"]
mod image;
#[path = "moves/limits.rs"]
mod limits;
#[path = "moves/memory.rs"]
mod memory;
#[path = "moves/network.rs"]
mod network;
#[path = "moves/processes.rs"]
mod processes;
#[path = "moves/refusals.rs"]
mod refusals;
#[path = "moves/shapes.rs"]
mod shapes;
#[path = "moves/sockets.rs"]
mod sockets;
#[path = "moves/specification.rs"]
mod specification;
#[path = "moves/table.rs"]
mod table;
#[path = "moves/terminals.rs"]
mod terminals;
#[path = "moves/tmpfs.rs"]
mod tmpfs;
#[path = "moves/watches.rs"]
mod watches;

/// The rows of all subjects, in the order of the document.
const SUBJECTS: &[(&str, &[table::Row])] = &[
    ("Processes", basics::ROWS),
    ("Processes", processes::ROWS),
    ("Clocks", clocks::ROWS),
    ("Memory", memory::ROWS),
    ("Large shapes", shapes::ROWS),
    ("Specification", specification::ROWS),
    ("Image", image::ROWS),
    ("Terminals and added processes", terminals::ROWS),
    ("Limits", limits::ROWS),
    ("Files", files::ROWS),
    ("Sockets", sockets::ROWS),
    ("Watches", watches::ROWS),
    ("Not for CRIU", refusals::ROWS),
    ("Attributes of files", attributes::ROWS),
    ("Network", network::ROWS),
    ("Files in memory", tmpfs::ROWS),
];

#[test]
fn the_table_in_the_documents_is_the_one_that_is_tested() -> anyhow::Result<()> {
    table::compare_with_document(SUBJECTS)
}
