//! Strings in which a serializer of JSON has nothing to escape, such as times and addresses.

use serde::{Serialize, Serializer};

/// The name of the newtype in which such a string is handed to a serializer. One that knows it copies the
/// text (`sink/serializer.rs`); for any other it means nothing.
pub const PLAIN: &str = "tcpclose::Plain";

/// Serializes a value whose text contains nothing to escape.
///
/// # Errors
/// Those of the serializer.
pub fn plain<S: Serializer>(value: &(impl Serialize + ?Sized), serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_newtype_struct(PLAIN, value)
}
