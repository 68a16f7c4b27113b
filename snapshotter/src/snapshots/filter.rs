//! containerd's filter grammar, as far as it applies to snapshots.
//!
//! ```text
//! filter    := selector ("," selector)*            all must match
//! selector  := fieldpath [operator value]          without an operator: the field is there
//! fieldpath := field ("." field)*                  kind, name, parent, labels.KEY, labels."KEY"
//! operator  := "==" | "!="
//! value     := quoted | [^\s,]+
//! quoted    := a Go string literal in double quotes
//! ```
//!
//! Space may stand before a field, an operator or a value, and nowhere else, as containerd has it.
//! A list of filters matches what any of them matches; an empty list and an empty filter match
//! everything. The third operator of the grammar, `~=` (a regular expression), is refused:
//! containerd sends none to a proxy.

use std::iter::Peekable;
use std::str::Chars;

use super::{Info, Kind};

/// Why a text is not a filter that snapshots can be listed by.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("filter {filter:?} is not valid: {reason}")]
pub struct FilterError {
    /// The whole filter, cut to a readable length.
    pub filter: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// Several filters, of which any may match.
#[derive(Debug)]
pub(super) struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
}

impl Filters {
    /// Errors: [`FilterError`] naming the first filter that is outside the grammar above.
    pub(super) fn parse(filters: &[String]) -> Result<Self, FilterError> {
        let parse = |filter: &String| {
            Parser { rest: filter.chars().peekable() }.selectors().map_err(|reason| FilterError {
                filter: filter.chars().take(200).collect(),
                reason,
            })
        };
        filters.iter().map(parse).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn matches(&self, info: &Info) -> bool {
        let matches = |selector: &Selector| selector.matches(info);
        self.0.is_empty() || self.0.iter().any(|selectors| selectors.iter().all(matches))
    }
}

impl Selector {
    fn matches(&self, info: &Info) -> bool {
        let value = self.value(info);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            // containerd: a field that is not there differs from every value.
            Test::NotEqual(unwanted) => value != Some(unwanted),
        }
    }

    fn value<'a>(&self, info: &'a Info) -> Option<&'a str> {
        let (field, rest) = self.path.split_first()?;
        match field.as_str() {
            "kind" => Some(match info.kind {
                Kind::View => "view",
                Kind::Active => "active",
                Kind::Committed => "committed",
            }),
            "name" => Some(&info.name),
            "parent" => Some(info.parent.as_deref().unwrap_or_default()),
            "labels" => info.labels.get(&rest.join(".")).map(String::as_str),
            _ => None,
        }
    }
}

struct Parser<'a> {
    rest: Peekable<Chars<'a>>,
}

impl Parser<'_> {
    fn selectors(&mut self) -> Result<Vec<Selector>, &'static str> {
        let mut selectors = Vec::new();
        if self.rest.peek().is_none() {
            return Ok(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            match self.rest.next() {
                None => return Ok(selectors),
                Some(',') => (),
                Some(_) => return Err("expected a comma or the end after a selector"),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, &'static str> {
        let mut path = vec![self.field()?];
        while self.rest.next_if_eq(&'.').is_some() {
            path.push(self.field()?);
        }
        if matches!(self.rest.peek(), None | Some(',')) {
            return Ok(Selector { path, test: Test::Present });
        }
        self.skip_space();
        let operator = self.run_of(|next| "=!~".contains(next));
        let test = match operator.as_str() {
            "==" => Test::Equal(self.value()?),
            "!=" => Test::NotEqual(self.value()?),
            "~=" => return Err("regular expressions are not supported"),
            _ => return Err("expected one of the operators == and !="),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, &'static str> {
        self.skip_space();
        if self.rest.peek() == Some(&'"') {
            return self.quoted();
        }
        let field = self.run_of(|next| next.is_ascii_alphanumeric() || next == '_');
        if field.is_empty() { Err("expected a field name") } else { Ok(field) }
    }

    fn value(&mut self) -> Result<String, &'static str> {
        self.skip_space();
        match self.rest.peek() {
            Some('"') => return self.quoted(),
            Some('/' | '|') => return Err("this quote is for regular expressions only"),
            _ => (),
        }
        let value = self.run_of(|next| next != ',' && !next.is_whitespace());
        if value.is_empty() { Err("expected a value") } else { Ok(value) }
    }

    /// The Go string literal that begins here. Byte escapes must together form UTF-8, as labels do.
    fn quoted(&mut self) -> Result<String, &'static str> {
        self.rest.next();
        let mut bytes = Vec::new();
        loop {
            match self.rest.next().ok_or("quoted text does not end")? {
                '"' => break,
                '\n' => return Err("quoted text does not end"),
                '\\' => self.escape(&mut bytes)?,
                other => bytes.extend(other.encode_utf8(&mut [0; 4]).bytes()),
            }
        }
        String::from_utf8(bytes).map_err(|_not_utf8| "quoted text is not UTF-8")
    }

    fn escape(&mut self, bytes: &mut Vec<u8>) -> Result<(), &'static str> {
        let simple = match self.rest.next().ok_or("quoted text does not end")? {
            'a' => 0x07,
            'b' => 0x08,
            'f' => 0x0c,
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'v' => 0x0b,
            '\\' => b'\\',
            '"' => b'"',
            'x' => self.byte(16, 2, 0)?,
            first @ '0'..='7' => self.byte(8, 2, first.to_digit(8).unwrap_or(0))?,
            unicode @ ('u' | 'U') => {
                let code = self.digits(16, if unicode == 'u' { 4 } else { 8 }, 0)?;
                let letter = char::from_u32(code).ok_or("no such Unicode character")?;
                bytes.extend(letter.encode_utf8(&mut [0; 4]).bytes());
                return Ok(());
            }
            _ => return Err("no such escape sequence"),
        };
        bytes.push(simple);
        Ok(())
    }

    fn byte(&mut self, radix: u32, count: u32, start: u32) -> Result<u8, &'static str> {
        self.digits(radix, count, start)?.try_into().map_err(|_too_large| "no such byte")
    }

    fn digits(&mut self, radix: u32, count: u32, start: u32) -> Result<u32, &'static str> {
        (0..count).try_fold(start, |value, _| {
            let digit = self.rest.next().and_then(|next| next.to_digit(radix));
            let digit = digit.ok_or("an escape sequence lacks digits")?;
            value.checked_mul(radix).and_then(|v| v.checked_add(digit)).ok_or("no such character")
        })
    }

    fn run_of(&mut self, belongs: impl Fn(char) -> bool) -> String {
        let mut run = String::new();
        while let Some(next) = self.rest.next_if(|next| belongs(*next)) {
            run.push(next);
        }
        run
    }

    fn skip_space(&mut self) {
        while self.rest.next_if(|next| next.is_whitespace()).is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::SystemTime;

    fn layer() -> Info {
        Info {
            name: "sha256:aa".to_owned(),
            parent: Some("default/1/base".to_owned()),
            kind: Kind::Committed,
            labels: [("containerd.io/snapshot.ref", "sha256:c0"), ("a.b", "x,\"y")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
        }
    }

    fn matches(filters: &[&str]) -> bool {
        let filters: Vec<_> = filters.iter().map(|text| (*text).to_owned()).collect();
        Filters::parse(&filters).unwrap().matches(&layer())
    }

    #[test]
    fn the_lookup_that_containerd_makes_after_already_exists_is_understood() {
        let by = |parent| {
            format!(r#"labels."containerd.io/snapshot.ref"==sha256:c0,parent=="{parent}""#)
        };
        assert!(matches(&[&by("default/1/base")]));
        assert!(!matches(&[&by("default/2/base")]));
    }

    #[test]
    fn selectors_of_one_filter_must_all_match_and_of_several_filters_any() {
        assert!(matches(&[]) && matches(&[""]));
        assert!(matches(&[" kind == committed, name==sha256:aa"]));
        assert!(!matches(&["kind==committed,name==other"]));
        assert!(matches(&["kind==active", "name==\"sha256:aa\""]));
        assert!(matches(&["name!=other"]) && !matches(&["name!=sha256:aa"]));
        assert!(matches(&["labels.none!=x"]) && !matches(&["labels.none"]));
        assert!(matches(&["labels.a.b"]) && matches(&[r#"labels."a.b"=="x,\"y""#]));
        assert!(matches(&[r#"labels."a.b"=="\x78\054\"\u0079""#]));
        assert!(!matches(&["unknown==x"]));
    }

    #[test]
    fn what_is_outside_the_grammar_is_named() {
        let spaced = [" ", "name ", "name==x ,kind", "name==x name==y", "a b"];
        for bad in ["name=x", "name==", "==x", "name==\"x", "name~=x"].into_iter().chain(spaced) {
            let error = Filters::parse(&[bad.to_owned()]).unwrap_err();
            assert_eq!(error.filter, bad);
        }
    }

    proptest! {
        #[test]
        fn any_value_can_be_quoted_and_parsing_never_panics(value: String, noise: String) {
            let _ = Filters::parse(&[noise]);
            // Rust's escapes of control characters are not Go's, so only backslash and quote are
            // escaped here.
            prop_assume!(!value.contains('\n'));
            let quoted = value.replace('\\', r"\\").replace('"', "\\\"");
            let filters = Filters::parse(&[format!("name==\"{quoted}\"")]).unwrap();
            let named = Info { name: value, ..layer() };
            prop_assert!(filters.matches(&named));
        }
    }
}
