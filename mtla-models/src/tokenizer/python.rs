//! What chat templates expect of Python: its JSON, its clock, its methods; and the cleaning up of decoded
//! text.

use jiff::{Zoned, fmt::strtime};
use minijinja::{
    Environment, Error, ErrorKind, Output, State, Value, escape_formatter,
    value::{Kwargs, ValueKind},
};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};
use std::{
    fmt::Write as _,
    io::{self, Write},
};

/// The most spaces of one level of indented JSON.
const DEEPEST_INDENT: usize = 32;

/// The most levels of JSON.
const DEEPEST: usize = 128;

/// Gives a template the filters, functions and methods that it has in Python.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(write_value);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
}

fn refuse(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Writes what stands in `{{ }}` as Python does. What lists and dictionaries hold is paid for one by one,
/// because a few of them within each other may be endless when written out.
fn write_value(
    output: &mut Output<'_>,
    state: &mut State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Seq | ValueKind::Map => {
            write_constant(output, state, value, 0)
        }
        _ => escape_formatter(output, state, value),
    }
}

/// Writes a value as it would stand in a program in Python.
fn write_constant(
    output: &mut Output<'_>,
    state: &State<'_, '_>,
    value: &Value,
    depth: usize,
) -> Result<(), Error> {
    state.consume_fuel(1)?;
    if depth > DEEPEST {
        return Err(refuse("a value is nested too deeply to be written"));
    }
    match value.kind() {
        ValueKind::None => output.write_str("None")?,
        ValueKind::Bool if value.is_true() => output.write_str("True")?,
        ValueKind::Bool => output.write_str("False")?,
        ValueKind::Seq => {
            output.write_str("[")?;
            for (index, item) in value.try_iter()?.enumerate() {
                output.write_str(if index > 0 { ", " } else { "" })?;
                write_constant(output, state, &item, depth + 1)?;
            }
            output.write_str("]")?;
        }
        ValueKind::Map => {
            output.write_str("{")?;
            for (index, key) in value.try_iter()?.enumerate() {
                output.write_str(if index > 0 { ", " } else { "" })?;
                write_constant(output, state, &key, depth + 1)?;
                output.write_str(": ")?;
                write_constant(output, state, &value.get_item(&key)?, depth + 1)?;
            }
            output.write_str("}")?;
        }
        _ => match value.as_str() {
            Some(text) => write_quoted(output, text)?,
            None => write!(output, "{value}")?,
        },
    }
    Ok(())
}

fn write_quoted(output: &mut Output<'_>, text: &str) -> std::fmt::Result {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    output.write_char(quote)?;
    for c in text.chars() {
        match c {
            '\n' => output.write_str("\\n")?,
            '\r' => output.write_str("\\r")?,
            '\t' => output.write_str("\\t")?,
            '\\' => output.write_str("\\\\")?,
            _ if c == quote => write!(output, "\\{c}")?,
            _ => output.write_char(c)?,
        }
    }
    output.write_char(quote)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(refuse(message))
}

/// The local time, in the letters of C's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    strtime::format(format, &Zoned::now()).map_err(|error| {
        refuse(format!(
            "strftime_now cannot write the time as `{format}`: {error}"
        ))
    })
}

/// JSON as Python writes it: a space after commas and colons, and letters of all languages as they are.
fn tojson(
    state: &State<'_, '_>,
    value: &Value,
    indent: Option<Value>,
    options: Kwargs,
) -> Result<String, Error> {
    let given = |value: Option<Value>| value.filter(|v| !v.is_none() && !v.is_undefined());
    let indent = match given(indent) {
        None => given(options.get("indent")?),
        given => given,
    };
    let indent = indent.map(usize::try_from).transpose()?;
    let separators = given(options.get("separators")?);
    let ascii = options.get::<Option<bool>>("ensure_ascii")?;
    options.assert_all_used()?;

    let (comma, colon) = match separators {
        Some(pair) => (text(&pair, 0)?, text(&pair, 1)?),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let style = PythonStyle {
        indent: indent.map(|indent| indent.min(DEEPEST_INDENT)),
        comma,
        colon,
        ascii: ascii.unwrap_or(false),
        depth: 0,
        empty: false,
    };
    let mut json = Paid {
        state,
        bytes: Vec::new(),
        cost: 0,
        out_of_fuel: None,
    };
    let written = value.serialize(&mut Serializer::with_formatter(&mut json, style));
    if let Some(error) = json.out_of_fuel {
        return Err(error);
    }
    written.map_err(|error| refuse(format!("tojson: {error}")))?;
    String::from_utf8(json.bytes).map_err(|error| refuse(format!("tojson: {error}")))
}

/// One of several texts.
fn text(pair: &Value, index: usize) -> Result<String, Error> {
    let value = pair.get_item_by_index(index)?;
    let text = value.as_str().map(str::to_owned);
    text.ok_or_else(|| refuse("tojson: `separators` are two texts"))
}

/// Bytes that the template pays for as they come: a small value may have a large JSON.
struct Paid<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    bytes: Vec<u8>,
    cost: usize,
    out_of_fuel: Option<Error>,
}

impl Write for Paid<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let before = self.cost / BYTES_PER_FUEL;
        self.cost += bytes.len() + WRITE;
        if let Err(error) = self
            .state
            .consume_fuel((self.cost / BYTES_PER_FUEL - before) as u64)
        {
            self.out_of_fuel = Some(error);
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How many bytes one unit of fuel pays for.
const BYTES_PER_FUEL: usize = 64;

/// The work of a piece of JSON, however short, as bytes.
const WRITE: usize = 32;

/// The layout of Python's `json.dumps`.
struct PythonStyle {
    indent: Option<usize>,
    comma: String,
    colon: String,
    ascii: bool,
    depth: usize,
    empty: bool,
}

impl PythonStyle {
    fn open<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(io::Error::other("the value is nested too deeply"));
        }
        self.empty = true;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.new_line(writer)?;
        }
        self.empty = false;
        writer.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.comma.as_bytes())?;
        }
        self.empty = false;
        self.new_line(writer)
    }

    fn new_line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(indent) = self.indent else {
            return Ok(());
        };
        writer.write_all(b"\n")?;
        (0..self.depth * indent).try_for_each(|_| writer.write_all(b" "))
    }
}

impl Formatter for PythonStyle {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.colon.as_bytes())
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.ascii {
            return writer.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            if c.is_ascii() {
                writer.write_all(&[c as u8])?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

/// Removes the spaces that a tokenizer by words leaves before punctuation and in English contractions.
pub(super) fn clean_up(text: &str) -> String {
    const CLEAN: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    let start = text.to_owned();
    CLEAN
        .iter()
        .fold(start, |text, (from, to)| text.replace(from, to))
}
