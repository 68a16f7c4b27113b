//! Documents that are run: the shell commands of a Markdown file, in their order, and where each
//! block of them belongs.
//!
//! A block of commands is fenced as `sh`, and its first line says where it runs:
//!
//! ````text
//! ```sh
//! # on edge-a and edge-b
//! godwit peers
//! ```
//!
//! ```text
//! true
//! ```
//! ````
//!
//! A `text` block behind it has lines that the commands print. `…` in such a line stands for
//! anything. Blocks of other languages are not for running.

use anyhow::{Context, Result, bail, ensure};

/// A fenced block of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its language; may be empty.
    pub language: String,
    /// Its lines, each with its end.
    pub text: String,
    /// The number of the line with its fence.
    pub line: usize,
}

/// Commands of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where they run, for example `edge-a`; in this order.
    pub places: Vec<String>,
    /// The commands, as the document has them.
    pub script: String,
    /// Lines that they print, in each place.
    pub prints: Vec<String>,
    /// The number of the line at which the block begins.
    pub line: usize,
}

/// The fenced blocks of a Markdown text.
///
/// Errors: a fence without an end.
pub fn blocks(markdown: &str) -> Result<Vec<Block>> {
    let mut found: Vec<Block> = Vec::new();
    let mut lines = (1..).zip(markdown.lines());
    while let Some((line, text)) = lines.next() {
        let Some(language) = text.trim_start().strip_prefix("```") else { continue };
        let indent = text.len() - text.trim_start().len();
        let mut block = Block { language: language.trim().to_owned(), text: String::new(), line };
        loop {
            let (_, text) =
                lines.next().with_context(|| format!("no end of line {line}'s fence"))?;
            if text.trim_start().starts_with("```") {
                break;
            }
            block.text.push_str(text.get(indent..).unwrap_or_default());
            block.text.push('\n');
        }
        found.push(block);
    }
    Ok(found)
}

/// The commands of a Markdown text.
///
/// Errors: a block of commands that does not say where it runs.
pub fn steps(markdown: &str) -> Result<Vec<Step>> {
    let mut steps: Vec<Step> = Vec::new();
    let mut follows = false;
    for block in blocks(markdown)? {
        match block.language.as_str() {
            "sh" => {
                let places = places(&block)?;
                steps.push(Step {
                    places,
                    script: block.text,
                    prints: Vec::new(),
                    line: block.line,
                });
            }
            "text" if follows => {
                let step = steps.last_mut().context("output without commands")?;
                step.prints = block.text.lines().map(str::to_owned).collect();
            }
            _ => {}
        }
        follows = block.language == "sh";
    }
    Ok(steps)
}

fn places(block: &Block) -> Result<Vec<String>> {
    let first = block.text.lines().next().unwrap_or_default();
    let Some(places) = first.strip_prefix("# on ") else {
        bail!("line {}: the block does not begin with `# on PLACE`", block.line);
    };
    Ok(places.split(" and ").map(str::to_owned).collect())
}

/// Errors: `output` lacks one of the lines, or has them in another order.
pub fn has_lines(output: &str, expected: &[String]) -> Result<()> {
    let mut lines = output.lines();
    for pattern in expected {
        let found = lines.any(|line| matches(line, pattern));
        ensure!(found, "no line {pattern:?}, or not in this order, in:\n{output}");
    }
    Ok(())
}

/// Whether a line is like a pattern. Runs of spaces are as good as one.
fn matches(line: &str, pattern: &str) -> bool {
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (line, pattern) = (words(line), words(pattern));
    let mut parts = pattern.split('…').map(str::trim);
    let Some(mut rest) = parts.next().and_then(|first| line.strip_prefix(first)) else {
        return false;
    };
    let mut last = None;
    for part in parts {
        let Some((_, behind)) = rest.split_once(part) else { return false };
        (rest, last) = (behind, Some(part));
    }
    rest.is_empty() || last.is_some_and(|last| last.is_empty() || rest.ends_with(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "\
1. First

   ```sh
   # on edge-a and edge-b
   echo one
   ```

   ```text
   one
   ```

```toml
key = 1
```

```sh
# on edge-a
echo two
```
";

    #[test]
    fn commands_are_found_with_their_places_and_what_they_print() -> Result<()> {
        let steps = steps(DOCUMENT)?;
        assert_eq!(steps.len(), 2);
        assert_eq!(steps[0].places, ["edge-a", "edge-b"]);
        assert_eq!(steps[0].script, "# on edge-a and edge-b\necho one\n");
        assert_eq!(steps[0].prints, ["one"]);
        assert_eq!((steps[1].line, steps[1].prints.len()), (16, 0));
        Ok(())
    }

    #[test]
    fn commands_without_a_place_and_fences_without_an_end_are_errors() {
        assert!(super::steps("```sh\nls\n```\n").is_err());
        assert!(blocks("```sh\nls\n").is_err());
    }

    #[test]
    fn lines_are_found_in_their_order_with_anything_for_an_ellipsis() {
        let expected = |lines: &[&str]| lines.iter().map(|&l| l.to_owned()).collect::<Vec<_>>();
        let output = "node  edge-a, CRIU 4.2\nstore: 12 objects\n";
        has_lines(output, &expected(&["node edge-a, CRIU …", "store: … objects"])).unwrap();
        has_lines(output, &expected(&["… objects", "node edge-a, CRIU …"])).unwrap_err();
        has_lines(output, &expected(&["node edge-a"])).unwrap_err();
        has_lines(output, &expected(&["store: … object"])).unwrap_err();
    }
}
