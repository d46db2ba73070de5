//! The header of a safetensors file: eight bytes of length, then JSON that says for each tensor its
//! type, its shape and where its bytes are (<https://huggingface.co/docs/safetensors>).
//!
//! The rules are those of the `safetensors` crate, which lends its types. Its own reader wants the
//! whole file as one slice and keeps to itself which tensor is at fault, so the rules are applied
//! here; a test holds both readers to the same verdict over thousands of mutated files.

use super::data_file::DataFile;
use super::{StoredType, byte_count};
use crate::error::{Error, Result};
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;

/// Longest header that the format allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Dimensions that a tensor may have; GPT-2's causal masks have four.
const MAX_DIMS: usize = 16;
/// Bytes of a tensor's name, which messages quote.
const MAX_NAME: usize = 256;
/// Characters of a parser's message that are passed on.
const MAX_REASON: usize = 400;
/// Bytes of the length before the header.
const LENGTH_BYTES: u64 = 8;

/// A tensor of the file.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Where its bytes begin, from the start of the file.
    pub(super) offset: u64,
}

impl Found {
    /// How its elements are stored, if weights can be.
    pub(super) fn stored_type(&self) -> Option<StoredType> {
        match self.dtype {
            Dtype::F32 => Some(StoredType::F32),
            Dtype::F16 => Some(StoredType::F16),
            Dtype::BF16 => Some(StoredType::BF16),
            Dtype::F64 => Some(StoredType::F64),
            _ => None,
        }
    }
}

/// What a header says.
#[derive(Debug)]
pub(super) struct Contents {
    /// `__metadata__`, in the writer's words.
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) tensors: Vec<Found>,
}

/// Reads the header, and checks that its tensors fill the rest of the file without gap or overlap.
pub(super) fn read(file: &DataFile) -> Result<Contents> {
    let path = || file.path().to_owned();
    if file.len() < LENGTH_BYTES {
        return Err(Error::HeaderTruncated { path: path(), wanted: LENGTH_BYTES, file_bytes: file.len() });
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Err(Error::HeaderTooLong { path: path(), bytes: length, limit: MAX_HEADER_BYTES });
    }
    let data_start = LENGTH_BYTES + length;
    if data_start > file.len() {
        return Err(Error::HeaderTruncated { path: path(), wanted: data_start, file_bytes: file.len() });
    }
    let mut json = vec![0; length as usize];
    file.read_exact_at(&mut json, LENGTH_BYTES)?;
    // As text, since a parser may skip over the bytes of values that nobody asks for unchecked.
    let json = std::str::from_utf8(&json).map_err(|error| malformed(file, &error))?;
    let header: Header = serde_json::from_str(json).map_err(|error| malformed(file, &error))?;

    let mut tensors: Vec<(String, Info)> = header.tensors.into_iter().collect();
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut filled = 0;
    let mut found = Vec::with_capacity(tensors.len());
    for (name, info) in tensors {
        let (begin, end) = info.data_offsets;
        if begin != filled || end < begin {
            return Err(Error::TensorOffsets { name, path: path(), begin, end, expected: filled });
        }
        let bytes = stored_bytes(&name, &info)?;
        if end - begin != bytes {
            return Err(Error::TensorBytes {
                name,
                path: path(),
                dtype: info.dtype.to_string(),
                shape: info.shape.0,
                expected: bytes,
                found: end - begin,
            });
        }
        filled = end;
        found.push(Found { name, dtype: info.dtype, shape: info.shape.0, offset: data_start + begin });
    }
    if filled != file.len() - data_start {
        return Err(Error::DataLength { path: path(), expected: filled, found: file.len() - data_start });
    }
    Ok(Contents { metadata: header.metadata, tensors: found })
}

/// The error for a header that is not the JSON it should be. A parser quotes what it found, which
/// may be most of the file: the message is cut.
fn malformed(file: &DataFile, error: &dyn fmt::Display) -> Error {
    let reason = error.to_string();
    let cut = reason.char_indices().nth(MAX_REASON).map_or(reason.len(), |(end, _)| end);
    Error::HeaderSyntax { path: file.path().to_owned(), reason: reason[..cut].to_owned() }
}

/// Bytes that the shape and type ask for.
fn stored_bytes(name: &str, info: &Info) -> Result<u64> {
    // Counted in bits: the 4- and 6-bit types have no whole number of bytes an element.
    let bits = byte_count(name, &info.shape.0, info.dtype.bitsize())?;
    if bits % 8 == 0 {
        Ok(bits / 8)
    } else {
        Err(Error::TensorBits {
            name: name.to_owned(),
            dtype: info.dtype.to_string(),
            shape: info.shape.0.clone(),
        })
    }
}

/// What the header says of one tensor.
#[derive(Deserialize)]
struct Info {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// A shape that stops growing at [`MAX_DIMS`]: a header of nothing but dimensions would otherwise
/// take a multiple of its length.
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Dims;
        impl<'de> Visitor<'de> for Dims {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a list of at most {MAX_DIMS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut dims: A) -> std::result::Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dim) = dims.next_element()? {
                    if shape.len() == MAX_DIMS {
                        return Err(A::Error::invalid_length(MAX_DIMS + 1, &self));
                    }
                    shape.push(dim);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(Dims)
    }
}

/// All tensors by name. Its own reader, since a derived one would let a name come twice.
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Info>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut tensors = BTreeMap::new();
                let mut metadata = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        let strings = map.next_value::<Option<BTreeMap<String, String>>>()?;
                        if metadata.replace(strings).is_some() {
                            return Err(A::Error::duplicate_field("__metadata__"));
                        }
                        continue;
                    }
                    if name.len() > MAX_NAME {
                        return Err(A::Error::custom(format_args!(
                            "a tensor's name has {} bytes; at most {MAX_NAME} are allowed",
                            name.len()
                        )));
                    }
                    let info = map
                        .next_value::<Info>()
                        .map_err(|error| A::Error::custom(format_args!("tensor {name}: {error}")))?;
                    if tensors.contains_key(&name) {
                        return Err(A::Error::custom(format_args!("tensor {name} is there twice")));
                    }
                    tensors.insert(name, info);
                }
                Ok(Header { metadata: metadata.flatten().unwrap_or_default(), tensors })
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}
