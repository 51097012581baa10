//! The model of a `finding` line.

use std::{collections::BTreeMap, net::IpAddr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{event::Time, tcp::display_as_serialized};

display_as_serialized!(FindingKind, Confidence);

/// What a diagnosis found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Finding {
    /// Time of the last line that was read.
    pub time: Time,
    /// The number of the line, counted from 1.
    pub seq: u64,
    /// What it is.
    pub kind: FindingKind,
    /// The program that it is about.
    pub process: Option<Program>,
    /// The other side.
    pub remote: Option<Remote>,
    /// How many connections show it.
    pub count: u64,
    /// When the first of them did.
    pub first: Time,
    /// When the last of them did.
    pub last: Time,
    /// How sure it is.
    pub confidence: Confidence,
    /// The numbers that show it, with their units in their names.
    pub evidence: BTreeMap<String, Evidence>,
    /// What happened, in a sentence or two.
    pub summary: String,
    /// What to change, in a sentence or two.
    pub advice: String,
    /// `seq` of up to ten lines that show it.
    pub lines: Vec<u64>,
    /// The files that these lines are in, one for each of `lines`; null unless several files were read.
    pub files: Option<Vec<String>>,
}

/// Kinds of finding.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[clap(rename_all = "snake_case")]
pub enum FindingKind {
    /// The peer closes idle connections of a pool before the pool does.
    KeepaliveMismatch,
    /// Clients closed before they had an answer.
    ClientGaveUp,
    /// A server ended connections before it had answered.
    BackendDied,
    /// Sockets that a program never closes.
    Leak,
    /// Short connections use up the local ports.
    TimeWaitPressure,
    /// A server closed with unread data, and may lose its answer.
    UnreadClose,
    /// The accept queue is full.
    AcceptOverflow,
    /// A device on the path forgets idle connections.
    IdleCut,
    /// Connection attempts are refused.
    Refused,
    /// Connection attempts are not answered.
    ConnectUnanswered,
    /// RSTs that the peer does not seem to have sent.
    Forged,
    /// A process was stopped with its connections open: a restart.
    Deploy,
    /// One lost connection caused the end of others, from process to process.
    Chain,
}

/// How sure a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Confidence {
    /// The kernel reports it, or both ends of the connection show it.
    Proven,
    /// Twenty connections or more agree; if it concerns times, these agree within 5 %.
    Strong,
    /// No more connections than a finding needs, or times that are no more regular than it needs.
    Fair,
}

/// A program, which may be several processes of one name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Program {
    /// Its process id; null if there are several.
    pub pid: Option<u32>,
    /// Its name.
    pub comm: String,
    /// Its file.
    pub exe: Option<String>,
    /// Container id.
    pub container: Option<String>,
}

/// The other side of the connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Remote {
    /// Its address; null if there are several.
    pub address: Option<IpAddr>,
    /// Its port; null if there are several, as those of clients are.
    pub port: Option<u16>,
    /// The program at that end, where that end was traced as well.
    pub comm: Option<String>,
}

/// A number that supports the finding, or a name that belongs to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Evidence {
    /// How many.
    Count(u64),
    /// A time, a rate or a share.
    Number(f64),
    /// A name, such as that of a function or a port.
    Text(String),
    /// Not known.
    Unknown,
}

impl From<u64> for Evidence {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<f64> for Evidence {
    /// Rounded to thousandths, because further digits have no meaning here.
    fn from(number: f64) -> Self {
        Self::Number((number * 1000.0).round() / 1000.0)
    }
}

impl From<String> for Evidence {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl<T: Into<Evidence>> From<Option<T>> for Evidence {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Unknown, Into::into)
    }
}
