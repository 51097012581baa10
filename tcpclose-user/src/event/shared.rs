//! Parts that many events have in common. They are shared between events, and serialized to JSON once.

use std::{
    borrow::Cow,
    fmt,
    ops::{Deref, DerefMut},
    sync::{Arc, OnceLock},
};

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

/// The name of the newtype in which finished JSON is handed to a serializer. One that knows it copies the
/// text (`sink/serializer.rs`); for any other it means nothing.
pub const FINISHED: &str = "tcpclose::Finished";

/// A value that many events have in common, such as a process, or the frames of a stack: programs have few
/// places that open and close sockets.
pub struct Shared<T>(Arc<Content<T>>);

struct Content<T> {
    value: T,
    json: OnceLock<Option<Box<RawValue>>>,
}

impl<T> From<T> for Shared<T> {
    fn from(value: T) -> Self {
        Self(Arc::new(Content { value, json: OnceLock::new() }))
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T> Shared<T> {
    /// Its address. No other value has the same address as long as this one is kept.
    pub fn address(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }

    /// Whether both are one value, not only equal ones.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<T: Clone> Clone for Content<T> {
    fn clone(&self) -> Self {
        Self { value: self.value.clone(), json: OnceLock::new() }
    }
}

impl<T: Clone> DerefMut for Shared<T> {
    /// Gives access to change the value; in a copy of it if it is shared.
    fn deref_mut(&mut self) -> &mut T {
        let content = Arc::make_mut(&mut self.0);
        content.json.take();
        &mut content.value
    }
}

impl<T: PartialEq> PartialEq for Shared<T> {
    fn eq(&self, other: &Self) -> bool {
        self.is_same(other) || **self == **other
    }
}

impl<T: Eq> Eq for Shared<T> {}

impl<T: fmt::Debug> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: Serialize> Serialize for Shared<T> {
    /// JSON that was made before is copied. (Only serializers of JSON understand it, and nothing else is used
    /// here.)
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.json.get_or_init(|| serde_json::value::to_raw_value(&self.0.value).ok()) {
            Some(json) => serializer.serialize_newtype_struct(FINISHED, json),
            None => self.0.value.serialize(serializer),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Shared<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(deserializer).map(Self::from)
    }
}

impl<T: JsonSchema> JsonSchema for Shared<T> {
    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }

    fn inline_schema() -> bool {
        T::inline_schema()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_seen_in_json_and_not_by_others() {
        let mut one = Shared::from("one".to_owned());
        let other = one.clone();
        assert_eq!(serde_json::to_string(&one).unwrap(), r#""one""#);
        one.push_str(" more");
        assert_eq!(serde_json::to_string(&one).unwrap(), r#""one more""#);
        assert_eq!(serde_json::to_string(&other).unwrap(), r#""one""#);
        assert!(!one.is_same(&other));
    }
}
