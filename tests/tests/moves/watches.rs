//! Watched files and directories.

use anyhow::Result;

use crate::bed::{self, destination, init, probe, source};
use crate::table::rows;

rows! {
    a_watched_directory_of_the_root_goes_on_being_watched: "inotify on a directory of the root file system", Moves, "by its path" => goes_on();
}

fn goes_on() -> Result<()> {
    let name = "watch";
    bed::start(&probe(name, &["watch"]))?;
    let make = |at: &godwit_tests::Node, file: &str| {
        at.sh(&format!("touch /proc/{}/root/srv/watched/{file}", init(at, name)?))
    };
    make(source(), "one")?;
    bed::status_becomes(source(), name, |line| line == "made 1")?;
    bed::moved(name)?;
    make(destination(), "two")?;
    bed::status_becomes(destination(), name, |line| line == "made 2")?;
    bed::remove(destination(), name)
}
