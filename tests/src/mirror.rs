//! The Debian mirror that the host itself uses: roots are made from there and from nowhere else.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Environment variable that names a mirror, for hosts whose apt does not know one.
const VARIABLE: &str = "GODWIT_DEBIAN_MIRROR";

/// Address of a Debian mirror, for example `http://mirror.example/debian`.
///
/// Errors: the host's apt sources name none and the variable is not set.
pub(crate) fn address() -> Result<String> {
    if let Ok(address) = std::env::var(VARIABLE) {
        return Ok(address);
    }
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let texts =
        files.iter().filter(|file| is_source(file)).filter_map(|f| fs::read_to_string(f).ok());
    texts.into_iter().find_map(|text| main_archive(&text)).with_context(|| {
        format!("no Debian mirror in the host's apt sources; name one by setting {VARIABLE}")
    })
}

fn is_source(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "list" || extension == "sources")
}

/// The first address of the main archive in a file of either of apt's two formats.
fn main_archive(text: &str) -> Option<String> {
    let lines = text.lines().map(str::trim);
    let mut words = lines
        .filter(|line| line.starts_with("deb ") || line.starts_with("URIs:"))
        .flat_map(str::split_whitespace);
    // Security, vendors' archives and the like have other last parts.
    words
        .find(|word| word.contains("://") && word.trim_end_matches('/').ends_with("/debian"))
        .map(|word| word.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_archive_is_found_in_both_formats() {
        let old = "deb http://a.example/debian-security x main\ndeb [arch=amd64] http://b.example/debian x main\n";
        assert_eq!(main_archive(old).as_deref(), Some("http://b.example/debian"));
        let new = "Types: deb\n# URIs: http://no.example/debian\nURIs: https://c.example/debian/\n";
        assert_eq!(main_archive(new).as_deref(), Some("https://c.example/debian"));
        assert_eq!(main_archive("deb http://d.example/apt x main"), None);
    }
}
