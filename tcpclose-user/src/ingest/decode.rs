//! Bytes of the ring buffer → records. No `unsafe`, no panic: whatever comes is either a whole record of this layout
//! or an error that says what it was.

use std::fmt;

use bytes::Bytes;
use tcpclose_common::record::{Connection, Header, Owner, Process, StackCopy, VERSION, tag};
use zerocopy::FromBytes;

/// A record of the kernel half.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A connection's end is over.
    Close(Box<Connection>),
    /// A RST was sent or received.
    Reset(Box<Connection>),
    /// The owner of a socket that had ended before.
    Owner(Owner),
    /// A socket in a state of the teardown, as it is now.
    Lingering(Box<Connection>),
    /// A process not seen before.
    Process(Process),
    /// A copy of a user stack, and its bytes.
    Stack(StackCopy, Bytes),
}

/// Bytes that are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Shorter than a header.
    Short(usize),
    /// Of another layout.
    Version(u16),
    /// Of no known kind.
    Tag(u16),
    /// Not as long as its kind is, or not as long as its header says.
    Length {
        /// Of which kind.
        tag: u16,
        /// Bytes that there were.
        found: usize,
        /// Bytes that there should have been.
        expected: usize,
    },
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short(length) => write!(f, "a record of {length} bytes, shorter than a header"),
            Self::Version(version) => {
                write!(f, "a record of layout version {version}, this is version {VERSION}")
            }
            Self::Tag(tag) => write!(f, "a record of unknown kind {tag}"),
            Self::Length { tag, found, expected } => {
                write!(f, "a record of kind {tag} with {found} bytes in place of {expected}")
            }
        }
    }
}

impl std::error::Error for DecodeError {}

/// Decodes one record.
///
/// # Errors
/// See [`DecodeError`].
pub fn decode(bytes: &Bytes) -> Result<Record, DecodeError> {
    let (header, _) = Header::read_from_prefix(bytes).map_err(|_| DecodeError::Short(bytes.len()))?;
    if header.version != VERSION {
        return Err(DecodeError::Version(header.version));
    }
    match header.tag {
        tag::CLOSE => whole(header, bytes).map(Box::new).map(Record::Close),
        tag::RESET => whole(header, bytes).map(Box::new).map(Record::Reset),
        tag::LINGERING => whole(header, bytes).map(Box::new).map(Record::Lingering),
        tag::OWNER => whole(header, bytes).map(Record::Owner),
        tag::PROCESS => whole(header, bytes).map(Record::Process),
        tag::STACK => stack(header, bytes),
        unknown => Err(DecodeError::Tag(unknown)),
    }
}

fn whole<T: FromBytes>(header: Header, bytes: &[u8]) -> Result<T, DecodeError> {
    let wrong = DecodeError::Length { tag: header.tag, found: bytes.len(), expected: size_of::<T>() };
    if usize::try_from(header.length) != Ok(size_of::<T>()) {
        return Err(wrong);
    }
    T::read_from_bytes(bytes).map_err(|_| wrong)
}

/// A stack's bytes have the rest of the record, or a part of that.
fn stack(header: Header, bytes: &Bytes) -> Result<Record, DecodeError> {
    let (found, expected) = (bytes.len(), usize::try_from(header.length).unwrap_or(usize::MAX));
    let wrong = DecodeError::Length { tag: header.tag, found, expected };
    let (copy, rest) = StackCopy::read_from_prefix(bytes).map_err(|_| wrong)?;
    let length = usize::try_from(copy.bytes).unwrap_or(usize::MAX);
    if found != expected || length > rest.len() {
        return Err(wrong);
    }
    let start = size_of::<StackCopy>();
    Ok(Record::Stack(copy, bytes.slice(start..start + length)))
}

#[cfg(test)]
mod tests {
    use tcpclose_common::record::Task;
    use zerocopy::{FromZeros as _, IntoBytes};

    use super::*;

    fn owner() -> Owner {
        let length = u32::try_from(size_of::<Owner>()).unwrap();
        Owner {
            header: Header { tag: tag::OWNER, version: VERSION, length },
            sock: 1,
            born: 2,
            task: Task { pid: 3, ..Task::NONE },
            holds: 0,
            fd: 0,
        }
    }

    #[test]
    fn whole_records() {
        let mut connection = Connection::NEW;
        for (kind, wrap) in
            [(tag::CLOSE, Record::Close as fn(Box<Connection>) -> Record), (tag::RESET, Record::Reset)]
        {
            connection.header.tag = kind;
            let bytes = Bytes::copy_from_slice(connection.as_bytes());
            assert_eq!(decode(&bytes), Ok(wrap(Box::new(connection))));
        }
        assert_eq!(decode(&Bytes::copy_from_slice(owner().as_bytes())), Ok(Record::Owner(owner())));
    }

    #[test]
    fn every_wrong_length_is_named() {
        let bytes = Bytes::copy_from_slice(owner().as_bytes());
        for length in 0..bytes.len() {
            let error = decode(&bytes.slice(..length)).unwrap_err();
            if length < size_of::<Header>() {
                assert_eq!(error, DecodeError::Short(length));
            } else {
                let expected = size_of::<Owner>();
                assert_eq!(error, DecodeError::Length { tag: tag::OWNER, found: length, expected });
            }
        }
        let mut longer = bytes.to_vec();
        longer.push(0);
        assert!(matches!(decode(&longer.into()), Err(DecodeError::Length { .. })));
    }

    #[test]
    fn a_stack_has_the_bytes_that_it_says() {
        let mut copy = StackCopy::new_zeroed();
        copy.header = Header { tag: tag::STACK, version: VERSION, length: 72 + 16 };
        copy.bytes = 8;
        let record = |copy: StackCopy| Bytes::from([copy.as_bytes(), &[1; 8], &[2; 8]].concat());
        assert_eq!(decode(&record(copy)), Ok(Record::Stack(copy, Bytes::from_static(&[1; 8]))));
        let long = StackCopy { bytes: 17, ..copy };
        assert!(matches!(decode(&record(long)), Err(DecodeError::Length { .. })));
        let cut = record(copy).slice(..80);
        assert_eq!(decode(&cut), Err(DecodeError::Length { tag: tag::STACK, found: 80, expected: 88 }));
        assert!(matches!(decode(&record(copy).slice(..71)), Err(DecodeError::Length { .. })));
    }

    #[test]
    fn a_header_that_lies_about_its_length() {
        let mut lying = owner();
        lying.header.length += 8;
        let error = decode(&Bytes::copy_from_slice(lying.as_bytes())).unwrap_err();
        assert!(matches!(error, DecodeError::Length { .. }), "{error}");
    }

    #[test]
    fn unknown_kinds_and_versions() {
        let mut unknown = owner();
        unknown.header.tag = 77;
        assert_eq!(decode(&Bytes::copy_from_slice(unknown.as_bytes())), Err(DecodeError::Tag(77)));
        unknown.header.version = VERSION + 1;
        assert_eq!(
            decode(&Bytes::copy_from_slice(unknown.as_bytes())),
            Err(DecodeError::Version(VERSION + 1))
        );
    }
}
