//! The terms of TCP: endpoints, states, roles and directions, with the names that they have in the JSON
//! output.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::plain::plain;

/// Makes `Display` write the name that a value has in JSON, so that there is only one list of names.
macro_rules! display_as_serialized {
    ($($name:ty),+ $(,)?) => {
        $(impl std::fmt::Display for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                serde::Serialize::serialize(self, formatter)
            }
        })+
    };
}
pub(crate) use display_as_serialized;

display_as_serialized!(Direction, Family, Role, State);

/// Address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// IPv4, mapped or not.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Endpoint {
    /// IPv4 or IPv6 address.
    #[serde(serialize_with = "plain")]
    #[schemars(with = "IpAddr")]
    pub address: IpAddr,
    /// TCP port.
    pub port: u16,
}

/// Who opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It called `connect()`.
    Client,
    /// It was accepted.
    Server,
}

/// Direction of a RST.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// This host sent it.
    Sent,
    /// This host received it.
    Received,
}

/// A TCP state, under the name that `ss -o` and `netstat` users know from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[expect(missing_docs, reason = "the names are TCP's own")]
#[repr(u8)]
pub enum State {
    // The kernel's number of this state; the others follow.
    Established = 1,
    SynSent,
    SynRecv,
    #[serde(rename = "FIN_WAIT1")]
    FinWait1,
    #[serde(rename = "FIN_WAIT2")]
    FinWait2,
    TimeWait,
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
    NewSynRecv,
}

impl State {
    /// From the kernel's number; `None` for one that is not a TCP state.
    pub fn from_kernel(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Established,
            2 => Self::SynSent,
            3 => Self::SynRecv,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            7 => Self::Close,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            10 => Self::Listen,
            11 => Self::Closing,
            12 => Self::NewSynRecv,
            _ => return None,
        })
    }
}
