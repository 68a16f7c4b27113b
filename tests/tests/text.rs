//! Texts: words that the project does not use, the width of comments, links, quoted messages, and
//! the licences of dependencies. It needs no nodes, and is part of `make lint`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use godwit_tests::command::host;
use godwit_tests::{document, place};

/// Words that readers would have to read twice, each with what to write instead.
const NOT_USED: &[(&str, &str)] = &[
    ("anew", "again, new, recreate"),
    ("for want of", "for lack of, without"),
    ("in vain", "without result, failed"),
    ("is minded", "is ready, is going to"),
    ("are told", "name the actor and what it sends or prints"),
    ("is told", "name the actor and what it sends or prints"),
    ("must not be there", "must not exist"),
    ("nobody", "no node, no peer, no caller, no process"),
    ("nowhere to be had", "not found"),
    ("passed over", "skipped"),
    ("passes over", "skips"),
    ("somebody", "a client, a caller, another process"),
    ("whoever", "the peer, neighbour, caller that"),
    ("whom", "the peer, neighbour, caller"),
];
/// Lines that may have such a word: `nobody` as a user's name, and this list.
const ALLOWED: &[(&str, &str)] = &[
    ("tests/src/images.rs", "\"Ledger\", \"8080\", \"nobody\""),
    ("tests/tests/text.rs", "(\""),
    ("tests/tests/text.rs", "`nobody` as"),
];
/// Columns of a comment.
const COLUMNS: usize = 100;
const README_LINES: usize = 130;
/// Text of others, and what is built.
const NOT_OURS: &[&str] = &["protos/vendor", "target", ".git", "LICENSE", "Cargo.lock"];
const TEXT: &[&str] =
    &["c", "go", "java", "md", "proto", "rs", "run", "service", "sh", "toml", "yaml", "Makefile"];

/// A text file of the workspace: its path there, and what it says.
struct Text {
    path: PathBuf,
    text: String,
}

impl Text {
    fn is(&self, kind: &str) -> bool {
        kind_of(&self.path) == kind
    }

    /// Its lines with their places.
    fn lines(&self) -> impl Iterator<Item = (String, &str)> {
        let path = self.path.display();
        (1..).zip(self.text.lines()).map(move |(line, text)| (format!("{path}:{line}"), text))
    }
}

fn kind_of(path: &Path) -> &str {
    path.extension().or(path.file_name()).and_then(|kind| kind.to_str()).unwrap_or_default()
}

fn texts() -> Result<Vec<Text>> {
    let mut texts = Vec::new();
    collect(&place::workspace(), Path::new(""), &mut texts)?;
    ensure!(texts.len() > 200, "only {} texts", texts.len());
    Ok(texts)
}

fn collect(workspace: &Path, below: &Path, texts: &mut Vec<Text>) -> Result<()> {
    for entry in fs::read_dir(workspace.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        if NOT_OURS.iter().any(|other| path == Path::new(other)) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            collect(workspace, &path, texts)?;
        } else if TEXT.contains(&kind_of(&path)) {
            let text = fs::read_to_string(entry.path()).context(path.display().to_string())?;
            texts.push(Text { path, text });
        }
    }
    Ok(())
}

fn none(what: &str, found: &[String]) -> Result<()> {
    ensure!(found.is_empty(), "{} {what}:\n{}", found.len(), found.join("\n"));
    Ok(())
}

/// Whether `text` has `word` with no letter, digit, `_` or `-` beside it, in either case.
fn has_word(text: &str, word: &str) -> bool {
    let text = text.to_lowercase();
    let joins = |one: char| one.is_alphanumeric() || one == '_' || one == '-';
    text.match_indices(word).any(|(begin, _)| {
        let before = text[..begin].chars().next_back();
        let after = text[begin + word.len()..].chars().next();
        !before.is_some_and(joins) && !after.is_some_and(joins)
    })
}

/// Method: also where a line ends within a phrase.
#[test]
fn words_that_the_project_does_not_use_are_not_used() -> Result<()> {
    let mut found = Vec::new();
    for text in texts()? {
        let allowed = |line: &str| {
            ALLOWED.iter().any(|(path, part)| text.path == Path::new(path) && line.contains(part))
        };
        let mut before = "";
        for (place, line) in text.lines() {
            let bare = line.trim_start().trim_start_matches(['/', '!', '#', '>']).trim_start();
            let last = before.rsplit(' ').next().unwrap_or_default();
            let joined = format!("{last} {bare}");
            for (word, instead) in NOT_USED {
                let is_split = word.contains(' ') && has_word(&joined, word);
                if (is_split || has_word(line, word)) && !allowed(line) {
                    found.push(format!("{place}: {word:?}: write {instead}"));
                }
            }
            before = line.trim_end();
        }
    }
    none("words", &found)
}

#[test]
fn comments_have_at_most_100_columns() -> Result<()> {
    let mut found = Vec::new();
    for text in texts()? {
        let marks: &[&str] = match kind_of(&text.path) {
            "rs" | "proto" | "c" | "go" | "java" => &["//"],
            "md" => continue,
            _ => &["# "],
        };
        let mut is_drawn = false;
        for (place, line) in text.lines() {
            is_drawn ^= line.contains("```");
            let is_comment = marks.iter().any(|mark| line.trim_start().starts_with(mark));
            // A word that is longer than a line cannot be broken.
            let words = line.split_whitespace().count();
            if is_comment && !is_drawn && words > 2 && line.chars().count() > COLUMNS {
                found.push(place);
            }
        }
    }
    none("comments that are too long", &found)
}

/// The name that GitHub gives the anchor of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|one| match one {
        ' ' => Some('-'),
        '-' | '_' => Some(one),
        one if one.is_alphanumeric() => Some(one.to_ascii_lowercase()),
        _ => None,
    });
    kept.collect()
}

fn anchors(markdown: &str) -> BTreeSet<String> {
    let headings = markdown.lines().filter(|line| line.starts_with('#'));
    headings.map(|line| anchor(line.trim_start_matches('#'))).collect()
}

/// Targets of the links of a line.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target)
}

#[test]
fn links_lead_to_files_and_headings_that_exist() -> Result<()> {
    let mut found = Vec::new();
    let mut count = 0;
    for text in texts()?.iter().filter(|text| text.is("md")) {
        for (place, line) in text.lines() {
            for link in links(line).filter(|link| !link.contains("://")) {
                count += 1;
                if !leads_somewhere(&text.path, link) {
                    found.push(format!("{place}: {link}"));
                }
            }
        }
    }
    ensure!(count > 100, "only {count} links");
    none("dead links", &found)
}

fn leads_somewhere(from: &Path, link: &str) -> bool {
    let (path, heading) = link.split_once('#').map_or((link, None), |(p, h)| (p, Some(h)));
    let mut to = from.parent().unwrap_or(Path::new("")).to_path_buf();
    for part in Path::new(path).components() {
        match part {
            Component::ParentDir => drop(to.pop()),
            part => to.push(part),
        }
    }
    let to = place::workspace().join(if path.is_empty() { from } else { &to });
    let Some(heading) = heading else { return to.exists() };
    fs::read_to_string(to).is_ok_and(|text| anchors(&text).contains(heading))
}

#[test]
fn the_readme_is_short() -> Result<()> {
    let count = fs::read_to_string(place::workspace().join("README.md"))?.lines().count();
    ensure!(count <= README_LINES, "README.md has {count} lines");
    Ok(())
}

/// Messages in the first column of the tables are in backticks, with `…` for what differs.
#[test]
fn messages_in_the_troubleshooting_guide_are_those_of_the_programs() -> Result<()> {
    let texts = texts()?;
    let sources: Vec<String> =
        texts.iter().filter(|text| text.is("rs")).map(|text| unbroken(&text.text)).collect();
    let guide = fs::read_to_string(place::workspace().join("docs/troubleshooting.md"))?;
    let cells = guide.lines().filter_map(|line| line.strip_prefix("| `"));
    let first = |cells: &str| cells.split(" | ").next()?.split(" (`").next().map(str::to_owned);
    let messages: Vec<String> = cells.filter_map(first).collect();
    let mut found = Vec::new();
    let mut count = 0;
    for message in messages.iter().map(|message| message.trim_end_matches('`')) {
        count += 1;
        for part in message.split('…').map(str::trim).filter(|part| part.len() > 3) {
            if !sources.iter().any(|source| source.contains(part)) {
                found.push(format!("{message:?}: {part:?}"));
            }
        }
    }
    ensure!(count > 30, "only {count} messages");
    none("messages of no program", &found)
}

/// A source text without the line breaks inside its strings.
fn unbroken(source: &str) -> String {
    let mut parts = source.split("\\\n");
    let first = parts.next().unwrap_or_default().to_owned();
    let text = parts.fold(first, |text, part| text + part.trim_start());
    text.replace("\\\"", "\"")
}

/// `make` targets in the documents.
#[test]
fn make_targets_in_the_documents_exist() -> Result<()> {
    let makefile = fs::read_to_string(place::workspace().join("Makefile"))?;
    let suites = place::workspace().join("tests/tests");
    let exists = |target: &str| {
        let suite = target.strip_prefix("test-").unwrap_or_default();
        let suite = suite.trim_end_matches("-containerd-2");
        makefile.lines().any(|line| line.starts_with(&format!("{target}:")))
            || (!suite.is_empty() && suites.join(format!("{suite}.rs")).is_file())
            || suite == "SUITE"
    };
    let mut found = Vec::new();
    for text in texts()?.iter().filter(|text| text.is("md")) {
        for (place, line) in text.lines() {
            for mark in ["`make ", "# make "] {
                for (_, rest) in
                    line.match_indices(mark).map(|(at, _)| line.split_at(at + mark.len()))
                {
                    let end = rest.find(|one: char| !one.is_alphanumeric() && one != '-');
                    let target = &rest[..end.unwrap_or(rest.len())];
                    if !target.is_empty() && !exists(target) {
                        found.push(format!("{place}: make {target}"));
                    }
                }
            }
        }
    }
    none("unknown targets", &found)
}

/// Blocks of shell commands say where they run; the suite `quickstart` runs them.
#[test]
fn shell_commands_in_documents_that_are_run_have_a_place() -> Result<()> {
    for path in ["README.md", "docs/quickstart.md"] {
        let text = fs::read_to_string(place::workspace().join(path))?;
        ensure!(!document::steps(&text).context(path)?.is_empty(), "{path} has no commands");
    }
    Ok(())
}

/// Method: `deny.toml` has the list of licences; cargo says what the build is made of.
#[test]
fn dependencies_have_a_licence_that_is_allowed() -> Result<()> {
    let deny: toml::Table =
        fs::read_to_string(place::workspace().join("deny.toml"))?.parse().context("deny.toml")?;
    let allowed = deny["licenses"]["allow"].as_array().context("licenses.allow")?;
    let allowed: Vec<&str> = allowed.iter().filter_map(|licence| licence.as_str()).collect();
    let manifest = place::workspace().join("Cargo.toml").display().to_string();
    let rustc = host(&["rustc", "-vV"])?;
    let target = rustc.lines().find_map(|line| line.strip_prefix("host: ")).context("a host")?;
    let cargo = ["cargo", "metadata", "--locked", "--offline", "--format-version", "1"];
    let chosen = ["--filter-platform", target, "--manifest-path", &manifest];
    let metadata: serde_json::Value =
        serde_json::from_str(&host(&[&cargo[..], &chosen].concat())?)?;
    let packages = metadata["packages"].as_array().context("packages")?;
    ensure!(packages.len() > 100, "only {} packages", packages.len());
    let mut found = Vec::new();
    for package in packages {
        let licence = package["license"].as_str().unwrap_or("none");
        let expression = spdx::Expression::parse_mode(licence, spdx::ParseMode::LAX);
        let is_allowed = expression.is_ok_and(|expression| {
            expression.evaluate(|one| allowed.contains(&one.to_string().as_str()))
        });
        if !is_allowed {
            found.push(format!("{}: {licence}", package["name"]));
        }
    }
    none("packages without an allowed licence", &found)
}

#[test]
fn words_are_found_whole_and_in_either_case() {
    assert!(has_word("Whoever asks", "whoever") && has_word("asked in vain.", "in vain"));
    assert!(!has_word("whoever_asks()", "whoever") && !has_word("an anewer", "anew"));
    assert_eq!(anchor(" States in `godwit status`"), "states-in-godwit-status");
    assert_eq!(links("see [a](b.md#c) and [d](e)").collect::<Vec<_>>(), ["b.md#c", "e"]);
    assert_eq!(unbroken("\"one \\\n     two\""), "\"one two\"");
}
