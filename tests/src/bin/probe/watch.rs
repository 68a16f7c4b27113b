//! `watch`: watches the directory `/srv/watched` of the root file system by inotify. The line
//! counts what was made in it: `made COUNT`.

use std::fs;
use std::io;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::report;

pub(crate) fn watch(_arguments: &[String]) -> io::Result<()> {
    fs::create_dir_all("/srv/watched/deeper")?;
    let inotify = Inotify::init(InitFlags::empty())?;
    inotify.add_watch("/srv/watched", AddWatchFlags::IN_CREATE)?;
    let mut made = 0;
    loop {
        report(&format!("made {made}"))?;
        made += inotify.read_events()?.len();
    }
}
