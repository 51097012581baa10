//! A serializer of compact JSON for lines of events: it appends to a `Vec`, writes field names as they are,
//! and copies what was serialized before ([`Shared`](crate::event::Shared)).
//!
//! `serde_json` looks at each byte of each field name for something to escape, which took half the time of an
//! event. Names of fields and variants are therefore not escaped here: they are identifiers. Everything else
//! is identical to the output of `serde_json`, which a test checks byte by byte.

use serde::{
    Serialize, Serializer,
    ser::{self, Error as _},
};
use serde_json::Error;

use crate::{event::FINISHED, plain::PLAIN};

/// Appends `value` to `out`.
///
/// # Errors
/// Those of `serde_json`: a key of a map is not a string, or the value cannot be serialized.
pub fn append(out: &mut Vec<u8>, value: &impl Serialize) -> Result<(), Error> {
    value.serialize(JsonSerializer { out, text: TextKind::Any })
}

/// Serializes one value.
struct JsonSerializer<'a> {
    out: &'a mut Vec<u8>,
    /// What the value contains, if it is a string.
    text: TextKind,
}

/// What a string contains.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TextKind {
    /// Anything.
    Any,
    /// Nothing that would have to be escaped.
    Plain,
    /// JSON.
    Finished,
}

/// Serializes a sequence, a map or a struct.
struct Compound<'a> {
    out: &'a mut Vec<u8>,
    /// What comes before the next value: the opening bracket, and a comma after the first one.
    separator: u8,
    /// Its end: one bracket, or two for the variant of an enum.
    end: &'static [u8],
    /// It is the struct with one field in which `serde_json` wraps finished JSON.
    is_finished: bool,
}

impl<'a> JsonSerializer<'a> {
    /// A leaf that does not need to be escaped byte by byte.
    #[inline]
    fn leaf(self, value: &impl Serialize) -> Result<(), Error> {
        serde_json::to_writer(self.out, value)
    }

    #[inline]
    fn begin(self, bracket: u8, end: &'static [u8]) -> Compound<'a> {
        Compound { out: self.out, separator: bracket, end, is_finished: false }
    }

    /// Begins the variant of an enum: an object whose only field has its name.
    #[inline]
    fn variant(self, name: &str, bracket: u8, end: &'static [u8]) -> Compound<'a> {
        field_name(self.out, b'{', name);
        self.begin(bracket, end)
    }
}

/// The longest name that [`field_name`] appends at once.
const LONG_NAME: usize = 28;

/// Appends the separator, the name and a colon.
///
/// It is inlined, as are its callers, so that the length of a name is a constant, and one check for room and a
/// few stores are enough.
#[inline(always)]
#[expect(clippy::inline_always, reason = "the names of 60 fields are copied for each event")]
fn field_name(out: &mut Vec<u8>, separator: u8, name: &str) {
    let name = name.as_bytes();
    let length = name.len();
    if length > LONG_NAME {
        out.extend_from_slice(&[separator, b'"']);
        out.extend_from_slice(name);
        out.extend_from_slice(b"\":");
        return;
    }
    let mut text = [0; LONG_NAME + 4];
    text[0] = separator;
    text[1] = b'"';
    text[2..2 + length].copy_from_slice(name);
    text[2 + length] = b'"';
    text[3 + length] = b':';
    out.extend_from_slice(&text[..4 + length]);
}

impl Compound<'_> {
    #[inline]
    fn value(&mut self, value: &(impl Serialize + ?Sized)) -> Result<(), Error> {
        value.serialize(JsonSerializer { out: self.out, text: TextKind::Any })
    }

    #[inline]
    fn element(&mut self, value: &(impl Serialize + ?Sized)) -> Result<(), Error> {
        self.out.push(self.separator);
        self.separator = b',';
        self.value(value)
    }

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "see `field_name`")]
    fn field(&mut self, name: &str, value: &(impl Serialize + ?Sized)) -> Result<(), Error> {
        if self.is_finished {
            return value.serialize(JsonSerializer { out: self.out, text: TextKind::Finished });
        }
        field_name(self.out, self.separator, name);
        self.separator = b',';
        self.value(value)
    }

    #[inline]
    fn finish(self) {
        if self.separator != b',' && !self.is_finished {
            self.out.push(self.separator);
        }
        self.out.extend_from_slice(self.end);
    }
}

macro_rules! leaves {
    ($($method:ident: $type:ty),* $(,)?) => {
        $(#[inline]
        fn $method(self, value: $type) -> Result<(), Error> {
            self.leaf(&value)
        })*
    };
}

impl<'a> Serializer for JsonSerializer<'a> {
    type Ok = ();
    type Error = Error;
    type SerializeSeq = Compound<'a>;
    type SerializeTuple = Compound<'a>;
    type SerializeTupleStruct = Compound<'a>;
    type SerializeTupleVariant = Compound<'a>;
    type SerializeMap = Compound<'a>;
    type SerializeStruct = Compound<'a>;
    type SerializeStructVariant = Compound<'a>;

    leaves! {
        serialize_bool: bool, serialize_char: char,
        serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64, serialize_i128: i128,
        serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64, serialize_u128: u128,
        serialize_f32: f32,
    }

    /// Most are milliseconds with whole microseconds ([`millis`](crate::event::millis)). With up to 15 digits,
    /// no shorter number is the same `f64`, so these digits are what `serde_json` writes.
    fn serialize_f64(self, value: f64) -> Result<(), Error> {
        #[expect(clippy::cast_possible_truncation, reason = "a cast of a float saturates")]
        let thousandths = (value * 1e3 + 0.5) as i64;
        #[expect(clippy::cast_precision_loss, reason = "what is lost makes it another number")]
        let is_same = (thousandths as f64 / 1e3).to_bits() == value.to_bits();
        if !is_same || !(0..=999_999_999_999_999).contains(&thousandths) {
            return self.leaf(&value);
        }
        let out = self.out;
        let (whole, rest) = (thousandths / 1000, u32::try_from(thousandths % 1000).unwrap_or(0));
        let digit = |number: u32| b'0' + u8::try_from(number % 10).unwrap_or(0);
        match u32::try_from(whole) {
            Ok(whole @ 0..10) => out.push(digit(whole)),
            _ => serde_json::to_writer(&mut *out, &whole)?,
        }
        out.extend_from_slice(&[b'.', digit(rest / 100), digit(rest / 10), digit(rest)]);
        let zeros = if rest % 100 == 0 { 2 } else { usize::from(rest % 10 == 0) };
        out.truncate(out.len() - zeros);
        Ok(())
    }

    #[inline]
    fn serialize_str(self, text: &str) -> Result<(), Error> {
        if self.text == TextKind::Finished {
            self.out.extend_from_slice(text.as_bytes());
            return Ok(());
        }
        let escaped = |byte: u8| byte < b' ' || byte == b'"' || byte == b'\\';
        // The loop has no early exit, so that the compiler processes many bytes at a time.
        if self.text == TextKind::Any && text.bytes().fold(false, |any, byte| any | escaped(byte)) {
            return self.leaf(&text);
        }
        self.out.push(b'"');
        self.out.extend_from_slice(text.as_bytes());
        self.out.push(b'"');
        Ok(())
    }

    fn serialize_bytes(self, bytes: &[u8]) -> Result<(), Error> {
        self.collect_seq(bytes)
    }

    #[inline]
    fn serialize_none(self) -> Result<(), Error> {
        self.serialize_unit()
    }

    #[inline]
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Error> {
        value.serialize(self)
    }

    #[inline]
    fn serialize_unit(self) -> Result<(), Error> {
        self.out.extend_from_slice(b"null");
        Ok(())
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<(), Error> {
        self.serialize_unit()
    }

    #[inline]
    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Result<(), Error> {
        self.out.push(b'"');
        self.out.extend_from_slice(variant.as_bytes());
        self.out.push(b'"');
        Ok(())
    }

    #[inline]
    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        let text = match name {
            FINISHED => TextKind::Finished,
            PLAIN => TextKind::Plain,
            _ => self.text,
        };
        value.serialize(JsonSerializer { text, ..self })
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        let mut object = self.begin(b'{', b"}");
        object.field(variant, value)?;
        object.finish();
        Ok(())
    }

    #[inline]
    fn serialize_seq(self, _: Option<usize>) -> Result<Compound<'a>, Error> {
        Ok(self.begin(b'[', b"]"))
    }

    fn serialize_tuple(self, _: usize) -> Result<Compound<'a>, Error> {
        Ok(self.begin(b'[', b"]"))
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Compound<'a>, Error> {
        Ok(self.begin(b'[', b"]"))
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Compound<'a>, Error> {
        Ok(self.variant(variant, b'[', b"]}"))
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Compound<'a>, Error> {
        Ok(self.begin(b'{', b"}"))
    }

    #[inline]
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Compound<'a>, Error> {
        if self.text == TextKind::Finished {
            return Ok(Compound { out: self.out, separator: b'{', end: b"", is_finished: true });
        }
        Ok(self.begin(b'{', b"}"))
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Compound<'a>, Error> {
        Ok(self.variant(variant, b'{', b"}}"))
    }
}

macro_rules! sequences {
    ($($trait:ident $method:ident),* $(,)?) => {
        $(impl ser::$trait for Compound<'_> {
            type Ok = ();
            type Error = Error;

            #[inline]
            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
                self.element(value)
            }

            #[inline]
            fn end(self) -> Result<(), Error> {
                self.finish();
                Ok(())
            }
        })*
    };
}

sequences! {
    SerializeSeq serialize_element,
    SerializeTuple serialize_element,
    SerializeTupleStruct serialize_field,
    SerializeTupleVariant serialize_field,
}

macro_rules! structs {
    ($($trait:ident),* $(,)?) => {
        $(impl ser::$trait for Compound<'_> {
            type Ok = ();
            type Error = Error;

            #[inline(always)]
            fn serialize_field<T: Serialize + ?Sized>(
                &mut self,
                name: &'static str,
                value: &T,
            ) -> Result<(), Error> {
                self.field(name, value)
            }

            #[inline]
            fn end(self) -> Result<(), Error> {
                self.finish();
                Ok(())
            }
        })*
    };
}

structs! { SerializeStruct, SerializeStructVariant }

impl ser::SerializeMap for Compound<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Error> {
        self.out.push(self.separator);
        self.separator = b',';
        let start = self.out.len();
        key.serialize(JsonSerializer { out: self.out, text: TextKind::Any })?;
        if self.out.get(start) != Some(&b'"') {
            return Err(Error::custom("a key of a map is not a string"));
        }
        self.out.push(b':');
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.value(value)
    }

    fn end(self) -> Result<(), Error> {
        self.finish();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::IpAddr};

    use super::*;
    use crate::event::{Shared, examples};

    #[track_caller]
    fn assert_same(value: &impl Serialize) {
        let mut appended = b"before ".to_vec();
        append(&mut appended, value).expect("serializable");
        let expected = serde_json::to_string(value).expect("serializable");
        assert_eq!(str::from_utf8(&appended).expect("UTF-8"), "before ".to_owned() + &expected);
    }

    #[test]
    fn events_are_as_serde_json_writes_them() {
        for event in examples::all() {
            assert_same(&event);
        }
    }

    #[test]
    fn every_kind_of_value_is_as_serde_json_writes_it() {
        #[derive(Serialize)]
        enum Any {
            Unit,
            New(u8),
            Tuple(i64, &'static str),
            Struct { one: Option<f64>, two: () },
        }
        #[derive(Serialize)]
        struct Empty {}
        #[derive(Serialize)]
        struct Unit;
        #[derive(Serialize)]
        struct Pair(Unit, Any);
        #[derive(Serialize)]
        struct All {
            any: [Any; 4],
            empty: Empty,
            none: Vec<u8>,
            pair: Pair,
            tuple: (char, bool),
            nested: Vec<Vec<Shared<String>>>,
            shared: Option<Shared<Vec<Empty>>>,
        }
        assert_same(&All {
            any: [
                Any::Unit,
                Any::New(7),
                Any::Tuple(i64::MIN, "\"\\\u{7f}\u{1b}\n\u{e9}"),
                Any::Struct { one: None, two: () },
            ],
            empty: Empty {},
            none: Vec::new(),
            pair: Pair(Unit, Any::Struct { one: Some(0.001), two: () }),
            tuple: ('"', true),
            nested: vec![vec![], vec![Shared::from("a,".to_owned()), Shared::from("\t".to_owned())]],
            shared: Some(Shared::from(vec![Empty {}])),
        });
        for number in [0.0, -0.0, -1.5, 1e12, 1e15, 1e16, 1e-7, 0.0005, f64::MAX, f64::NAN, f64::INFINITY] {
            assert_same(&number);
        }
        let powers = (0..60).map(|bits| 1_u64 << bits);
        for thousandths in (0..2_000).chain(powers).chain(999_999_999_999_990..1_000_000_000_000_020) {
            #[expect(clippy::cast_precision_loss, reason = "any number will do")]
            let number = thousandths as f64 / 1e3;
            assert_same(&number);
            assert_same(&number.next_up());
        }
        for byte in 0..=u8::MAX {
            assert_same(&char::from(byte).to_string());
        }
        for address in ["127.0.0.1", "::", "fe80::1:2", "255.255.255.255"] {
            assert_same(&address.parse::<IpAddr>().expect("an address"));
        }
        assert_same(&BTreeMap::from([("", 1), ("a\"b", 2)]));
        assert_same(&BTreeMap::<String, u8>::new());
        assert_same(&u64::MAX);
        assert!(append(&mut Vec::new(), &BTreeMap::from([(vec![1], 2)])).is_err());
    }
}
