//! Typed reading of a config's fields: each value is taken as what it must be, or refused by name.

use super::{ACTIVATIONS, Activation, END_OF_TEXT, MAX_CONFIG_BYTES};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// Characters of a file's own text that an error message quotes at most.
const QUOTED: usize = 60;

/// The config as a JSON object.
pub(super) fn parse(text: &str) -> Result<Map<String, Value>> {
    if text.len() > MAX_CONFIG_BYTES {
        return Err(Error::ConfigTooLong { bytes: text.len(), limit: MAX_CONFIG_BYTES });
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(Error::ConfigNotObject { found: describe(&other) }),
        Err(source) => {
            Err(Error::ConfigSyntax { near: excerpt(text, source.line(), source.column()), source })
        }
    }
}

/// The text of `line` (from 1) that ends just behind `column`, so that a literal JSON lacks (NaN) shows with its field.
fn excerpt(text: &str, line: usize, column: usize) -> String {
    let line = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
    let end = (column + 8).min(line.len());
    let shown = String::from_utf8_lossy(&line.as_bytes()[end.saturating_sub(QUOTED)..end]);
    shown.trim().to_owned()
}

/// A value as an error message shows it, cut short where it is long.
fn describe(value: &Value) -> String {
    let kind = match value {
        Value::Null => return "null".to_owned(),
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    let text = value.to_string();
    let mut shown: String = text.chars().take(QUOTED).collect();
    if shown.len() < text.len() {
        shown.push_str("...");
    }
    format!("{shown} ({kind})")
}

/// The error for a field that is not what it must be.
pub(super) fn wrong(field: &str, expected: &str, found: &Value) -> Error {
    Error::ConfigField { field: field.to_owned(), expected: expected.to_owned(), found: describe(found) }
}

/// An integer within `range`.
pub(super) fn integer(field: &str, value: &Value, range: RangeInclusive<usize>) -> Result<usize> {
    value
        .as_u64()
        .and_then(|n| usize::try_from(n).ok())
        .filter(|n| range.contains(n))
        .ok_or_else(|| wrong(field, &format!("an integer from {} to {}", range.start(), range.end()), value))
}

/// The fields of a config by name.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl Fields<'_> {
    /// The first of `names` that the config uses, for messages; the usual name where it uses none.
    pub(super) fn name(&self, names: &'static [&'static str]) -> &'static str {
        names.iter().find(|name| self.0.contains_key(**name)).unwrap_or(&names[0])
    }

    /// A size under any of `names`, which must agree, or nothing.
    pub(super) fn integer(
        &self,
        names: &'static [&'static str],
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>> {
        let mut first: Option<(&'static str, usize)> = None;
        for &name in names {
            let Some(value) = self.0.get(name) else { continue };
            let n = integer(name, value, range.clone())?;
            match first {
                None => first = Some((name, n)),
                Some((field, value)) if value != n => {
                    return Err(Error::ConfigConflict { field, value, other_field: name, other_value: n });
                }
                Some(_) => {}
            }
        }
        Ok(first.map(|(_, n)| n))
    }

    /// A size that must be there, or that an explicit GPT-2 config may leave to `GPT2Config`'s default.
    pub(super) fn size(
        &self,
        names: &'static [&'static str],
        range: RangeInclusive<usize>,
        default: usize,
    ) -> Result<usize> {
        match self.integer(names, range)? {
            Some(n) => Ok(n),
            None if self.0.contains_key("model_type") => Ok(default),
            None => Err(Error::ConfigMissing { field: names[0], other_names: names[1..].join(", ") }),
        }
    }

    pub(super) fn boolean(&self, name: &str, default: bool) -> Result<bool> {
        match self.0.get(name) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(wrong(name, "true or false", other)),
        }
    }

    /// The activation's name and function.
    pub(super) fn activation(&self, default: &'static str) -> Result<(&'static str, Activation)> {
        let value = self.0.get("activation_function");
        let name = value.map_or(Some(default), Value::as_str);
        ACTIVATIONS.into_iter().find(|&(known, _)| Some(known) == name).ok_or_else(|| {
            let known: Vec<&str> = ACTIVATIONS.iter().map(|&(known, _)| known).collect();
            let expected = format!("one of {}", known.join(", "));
            wrong("activation_function", &expected, value.unwrap_or(&Value::Null))
        })
    }

    /// The epsilon of the norms, which must still be above 0 and finite once it is a float32.
    pub(super) fn epsilon(&self) -> Result<f32> {
        const FIELD: &str = "layer_norm_epsilon";
        let Some(value) = self.0.get(FIELD) else { return Ok(1e-5) };
        value
            .as_f64()
            .map(|epsilon| epsilon as f32)
            .filter(|epsilon| epsilon.is_finite() && *epsilon > 0.0)
            .ok_or_else(|| wrong(FIELD, "a finite number above 0, as a float32", value))
    }

    /// The token that begins a text, unless the vocabulary lacks it.
    pub(super) fn bos_token_id(&self, n_vocab: usize) -> Result<Option<u32>> {
        let id = match self.0.get("bos_token_id") {
            None => Some(END_OF_TEXT),
            Some(Value::Null) => None,
            Some(value) => Some(token_id("bos_token_id", value)?),
        };
        Ok(id.filter(|&id| (id as usize) < n_vocab))
    }

    /// The tokens that end a text, without those that the vocabulary lacks.
    pub(super) fn eos_token_ids(&self, n_vocab: usize) -> Result<Vec<u32>> {
        const FIELD: &str = "eos_token_id";
        let mut ids = match self.0.get(FIELD) {
            None => vec![END_OF_TEXT],
            Some(Value::Null) => Vec::new(),
            Some(Value::Array(values)) => values.iter().map(|v| token_id(FIELD, v)).collect::<Result<_>>()?,
            Some(value) => vec![token_id(FIELD, value)?],
        };
        ids.retain(|&id| (id as usize) < n_vocab);
        Ok(ids)
    }

    /// The weights' type in the file's own words, from `dtype` (transformers 5) or `torch_dtype` (before it).
    pub(super) fn dtype(&self) -> Result<Option<String>> {
        for name in ["dtype", "torch_dtype"] {
            match self.0.get(name) {
                None | Some(Value::Null) => {}
                Some(Value::String(dtype)) => {
                    return Ok(Some(dtype.strip_prefix("torch.").unwrap_or(dtype).to_owned()));
                }
                Some(other) => return Err(wrong(name, "the name of a type, or null", other)),
            }
        }
        Ok(None)
    }
}

fn token_id(field: &str, value: &Value) -> Result<u32> {
    value
        .as_u64()
        .and_then(|id| u32::try_from(id).ok())
        .ok_or_else(|| wrong(field, "token ids (integers from 0 to 4294967295) or null", value))
}
