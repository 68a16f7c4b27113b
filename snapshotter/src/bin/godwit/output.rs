//! Where results go: tables and sentences for people, JSON for programs.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use godwit_protos::control::Progress;
use serde_json::json;

/// How they are shown.
pub(crate) struct Out {
    pub(crate) json: bool,
}

impl Out {
    pub(crate) fn raw(&self, json: &str, text: &str) -> anyhow::Result<()> {
        let text = if self.json { json } else { text };
        Ok(writeln!(std::io::stdout(), "{text}")?)
    }

    pub(crate) fn object(&self, object: &serde_json::Value, text: &str) -> anyhow::Result<()> {
        self.raw(&object.to_string(), text)
    }

    /// One object, a line for each field.
    pub(crate) fn fields(&self, object: &serde_json::Value) -> anyhow::Result<()> {
        let lines = object.as_object().into_iter().flatten();
        let lines = lines.map(|(key, value)| format!("{}: {}", key.replace('_', " "), cell(value)));
        self.object(object, &lines.collect::<Vec<_>>().join("\n"))
    }

    pub(crate) fn event(&self, event: &Progress) -> anyhow::Result<()> {
        let object = json!({"migration": event.migration, "step": event.step, "text": event.text});
        self.object(&object, &format!("{} {}: {}", event.migration, event.step, event.text))
    }

    pub(crate) fn table(
        &self,
        lines: &[serde_json::Value],
        columns: &[&str],
    ) -> anyhow::Result<()> {
        if self.json {
            return self.raw(&serde_json::Value::from(lines).to_string(), "");
        }
        let rows: Vec<Vec<String>> = lines
            .iter()
            .map(|line| columns.iter().map(|key| cell(&line[*key])).collect())
            .collect();
        let head: Vec<String> =
            columns.iter().map(|key| key.to_uppercase().replace('_', " ")).collect();
        let widths: Vec<usize> = (0..columns.len())
            .map(|at| rows.iter().chain([&head]).map(|row| row[at].len()).max().unwrap_or(0))
            .collect();
        let mut stdout = std::io::stdout().lock();
        for row in std::iter::once(&head).chain(&rows) {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            writeln!(stdout, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }

    /// A line that shows what is going on, on a terminal; nothing elsewhere.
    pub(crate) fn bar(&self) -> indicatif::ProgressBar {
        if self.json || !std::io::stderr().is_terminal() {
            return indicatif::ProgressBar::hidden();
        }
        let bar = indicatif::ProgressBar::new_spinner();
        let line = "{spinner} {elapsed} {wide_msg} {bytes} {bytes_per_sec}";
        if let Ok(style) = indicatif::ProgressStyle::with_template(line) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    }
}

fn cell(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
