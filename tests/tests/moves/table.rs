//! Rows of the table, and the document that they make.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result, ensure};
use godwit_tests::place;

/// The document that has the table.
const DOCUMENT: &str = "docs/moves.md";
/// The lines of the document between which the table stands.
const BEGIN: &str = "<!-- the table begins: written by the suite moves -->\n";
const END: &str = "<!-- the table ends -->\n";

/// What becomes of a thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is at the destination as it was.
    Moves,
    /// It moves, and `plan` and `migrate` warn of what becomes different.
    Warned,
    /// `plan` and `migrate` refuse it before the freeze.
    Refused,
}

/// A row of the table.
#[derive(Debug)]
pub(crate) struct Row {
    /// What a container has.
    pub(crate) what: &'static str,
    /// What becomes of it.
    pub(crate) outcome: Outcome,
    /// How, or what to do instead; may be empty.
    pub(crate) note: &'static str,
}

/// Declares the rows of a subject, `ROWS`, and a test for each.
///
/// ```text
/// rows! {
///     a_test_of_this_name: "periodic timerfd", Moves, "its ticks go on" => tries_it();
/// }
/// ```
macro_rules! rows {
    ($($name:ident: $what:literal, $outcome:ident, $note:literal => $body:expr;)+) => {
        pub(crate) const ROWS: &[$crate::table::Row] = &[$($crate::table::Row {
            what: $what,
            outcome: $crate::table::Outcome::$outcome,
            note: $note,
        }),+];

        $(
            #[test]
            fn $name() -> anyhow::Result<()> {
                $body
            }
        )+
    };
}
pub(crate) use rows;

fn table(subjects: &[(&str, &[Row])]) -> Result<String> {
    let mut text = String::from("| subject | what | becomes | |\n|---|---|---|---|\n");
    for (subject, rows) in subjects {
        for Row { what, outcome, note } in *rows {
            let outcome = match outcome {
                Outcome::Moves => "moves",
                Outcome::Warned => "moves, with a warning",
                Outcome::Refused => "refused",
            };
            writeln!(text, "| {subject} | {what} | {outcome} | {note} |")?;
        }
    }
    Ok(text)
}

/// Compares the table with the document, or writes it there if `GODWIT_WRITE_TABLE` is set.
pub(crate) fn compare_with_document(subjects: &[(&str, &[Row])]) -> Result<()> {
    let path = place::workspace().join(DOCUMENT);
    let document = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let (before, rest) = document.split_once(BEGIN).context("no begin of the table")?;
    let (_, after) = rest.split_once(END).context("no end of the table")?;
    let right = [before, BEGIN, &table(subjects)?, END, after].concat();
    if std::env::var_os("GODWIT_WRITE_TABLE").is_some() {
        fs::write(&path, &right)?;
    } else {
        let hint =
            "is not the table that is tested; GODWIT_WRITE_TABLE=1 make test-moves writes it";
        ensure!(document == right, "the one in {DOCUMENT} {hint}");
    }
    Ok(())
}
