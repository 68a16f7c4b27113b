//! Which module may use which: a path that starts with `crate::` points down [`ROWS`], or the test
//! fails. Code of tests is free to use all.

use std::fs;
use std::path::{Path, PathBuf};

/// From top to bottom. Modules of one row do not use each other.
const ROWS: &[&[&str]] = &[
    &["bin"],
    &["daemon"],
    &["api"],
    &["check"],
    &["capture", "layers", "mirror"],
    &["migrate"],
    &["retention"],
    &["node"],
    &["volumes"],
    &["directory"],
    &["peer"],
    &["config"],
    &["containerd", "ownership", "snapshots"],
    &["error", "host", "supervise"],
    // Crates of their own.
    &["content", "policy", "store"],
];

fn row(module: &str) -> Option<usize> {
    ROWS.iter().position(|row| row.contains(&module))
}

/// The source files below `directory`, without those that hold nothing but tests.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let is_code = |path: &PathBuf| {
        path.file_stem().is_none_or(|stem| stem != "tests")
            && (path.is_dir() || path.extension().is_some_and(|extension| extension == "rs"))
    };
    let files = entries.filter(is_code).flat_map(|path| match path.is_dir() {
        true => files(&path),
        false => vec![path],
    });
    files.collect()
}

/// The code without comments, and without the module of tests that ends it.
fn code(text: &str) -> String {
    let end = text.find("\n#[cfg(test)]\nmod ").unwrap_or(text.len());
    let lines = text[..end].lines();
    lines.map(|line| line.split("//").next().unwrap_or(line)).collect::<Vec<_>>().join("\n")
}

/// The modules below the crate's root that the code names; its own module is `depth` below.
fn used(code: &str, depth: usize) -> Vec<String> {
    let mut used = Vec::new();
    for root in ["crate::".to_owned(), "super::".repeat(depth)] {
        for (_, rest) in code.match_indices(&root).map(|(at, _)| code.split_at(at + root.len())) {
            let list = rest.strip_prefix('{').and_then(|rest| rest.split('}').next());
            let paths = list.unwrap_or(rest).split(',').take(list.map_or(1, |_| usize::MAX));
            let first = |path: &str| {
                let is_end = |letter: char| !letter.is_alphanumeric() && letter != '_';
                path.trim().split(is_end).next().unwrap_or_default().to_owned()
            };
            used.extend(paths.map(first).filter(|name| row(name).is_some() || root == "crate::"));
        }
    }
    used
}

/// Errors: in words, the first path that does not point down.
fn check(module: &str, code: &str, depth: usize) -> Result<(), String> {
    let from = row(module).ok_or_else(|| format!("module {module} has no row"))?;
    for name in used(code, depth) {
        let to = row(&name).ok_or_else(|| format!("crate::{name} has no row"))?;
        if name != module && to <= from {
            return Err(format!("{module} uses crate::{name}, which is not below it"));
        }
    }
    Ok(())
}

#[test]
fn modules_use_only_what_is_below_them() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut checked = 0;
    for file in files(&src) {
        let path = file.strip_prefix(&src).unwrap().with_extension("");
        let mut names: Vec<&str> = path.iter().filter_map(|name| name.to_str()).collect();
        names.retain(|name| *name != "mod");
        if matches!(names[..], ["lib" | "arrows"]) {
            continue;
        }
        let code = code(&fs::read_to_string(&file).unwrap());
        check(names[0], &code, names.len())
            .map_err(|why| format!("{}: {why}", file.display()))
            .unwrap();
        checked += 1;
    }
    assert!(checked > 60, "{checked} files are not all of the daemon");
}

#[test]
fn an_upward_path_is_found_wherever_it_stands() {
    assert_eq!(check("node", "use crate::store::Store;", 1), Ok(()));
    assert_eq!(check("node", "use crate::node::Node;", 1), Ok(()));
    for upward in [
        "use crate::migrate::MigrationError;",
        "use crate::{store::Store, migrate};",
        "let error = crate::migrate::chain(&error);",
        "use super::migrate::source;",
    ] {
        assert!(check("node", upward, 1).is_err(), "{upward}");
    }
    assert!(check("peer", "use super::super::node::Node;", 2).is_err());
    assert_eq!(check("peer", "use super::fetch::fetch;", 2), Ok(()));
    assert!(check("capture", "use crate::layers::Layers;", 1).is_err(), "the same row");
    assert!(check("node", "use crate::unheard_of::Thing;", 1).is_err());
    let text = "use crate::store;\n// use crate::migrate;\n\n#[cfg(test)]\nmod tests {\n    use crate::api;\n}\n";
    assert_eq!(check("node", &code(text), 1), Ok(()));
}
