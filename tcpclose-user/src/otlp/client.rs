//! The HTTP client: one connection, one request at a time, and what the answers mean
//! (<https://opentelemetry.io/docs/specs/otlp/#otlphttp>).

use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header::{CONTENT_TYPE, HOST, RETRY_AFTER, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use jiff::{Timestamp, fmt::rfc2822};
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceResponse;
use prost::Message as _;
use tokio::{net::TcpStream, time::timeout};

use super::settings::Settings;
use crate::sink::{cut, escape};

/// The most bytes of an answer that are read. The rest could only be a longer message.
const MAX_ANSWER: usize = 64 << 10;

/// The most characters of a collector's message that are shown.
const MAX_MESSAGE: usize = 200;

/// The longest time that a collector can ask for with `Retry-After`.
const LONGEST_WAIT: Duration = Duration::from_mins(5);

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The collector has answered, and has refused so many of the records; all if it is `u64::MAX`.
    Answered {
        /// How many records it does not want.
        refused: u64,
        /// Why, if it says so.
        message: Option<String>,
    },
    /// The same request may be taken later.
    TryAgain {
        /// When, if the collector says so.
        after: Option<Duration>,
        /// Why it was not taken now.
        message: String,
    },
}

/// A client of one collector.
pub struct Client {
    settings: Settings,
    /// The open connection, if there is one.
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    /// A client that has not connected yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, connection: None }
    }

    /// Sends a request, over the open connection if possible, and waits for the answer.
    pub async fn send(&mut self, body: Bytes) -> Delivery {
        // An exchange that fails leaves no connection.
        let connection = self.connection.take();
        let exchange = exchange(&self.settings, connection, body);
        match timeout(self.settings.patience, exchange).await {
            Ok(Ok((outcome, connection))) => {
                self.connection = Some(connection);
                outcome
            }
            Ok(Err(error)) => Delivery::TryAgain { after: None, message: format!("{error:#}") },
            Err(_) => {
                let message = format!("no answer within {:?}", self.settings.patience);
                Delivery::TryAgain { after: None, message }
            }
        }
    }
}

async fn exchange(
    settings: &Settings,
    open: Option<SendRequest<Full<Bytes>>>,
    body: Bytes,
) -> Result<(Delivery, SendRequest<Full<Bytes>>)> {
    let mut connection = match open {
        // A collector may close a connection that is idle.
        Some(open) if open.is_ready() => open,
        _ => connect(settings).await?,
    };
    let path = settings.url.path_and_query().map_or("/", |path| path.as_str());
    let authority = settings.url.authority().map_or("", |authority| authority.as_str());
    let mut request = Request::post(path).body(Full::new(body)).context("cannot make a request")?;
    // Headers of the user may replace the user agent, and nothing that the protocol needs.
    let headers = request.headers_mut();
    headers.insert(USER_AGENT, concat!("tcpclose/", env!("CARGO_PKG_VERSION")).parse()?);
    headers.extend(settings.headers.clone());
    headers.insert(HOST, authority.parse()?);
    headers.insert(CONTENT_TYPE, "application/x-protobuf".parse()?);
    let response = connection.send_request(request).await?;
    let outcome = outcome(response).await?;
    Ok((outcome, connection))
}

async fn connect(settings: &Settings) -> Result<SendRequest<Full<Bytes>>> {
    let stream = TcpStream::connect(settings.address()).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // An error reaches whoever sends a request as well.
    drop(tokio::spawn(connection));
    Ok(sender)
}

/// What a response means.
async fn outcome(response: Response<Incoming>) -> Result<Delivery> {
    let (head, body) = response.into_parts();
    let header = head.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let after = header.and_then(|text| wait(text, Timestamp::now()));
    let body = match Limited::new(body, MAX_ANSWER).collect().await {
        Ok(body) => body.to_bytes(),
        // The status is known, but the connection cannot be used again.
        Err(_) if head.status != StatusCode::OK => Bytes::new(),
        Err(error) => return Err(anyhow::Error::from_boxed(error).context("an answer that cannot be read")),
    };
    Ok(judge(head.status, after, &body))
}

fn judge(status: StatusCode, after: Option<Duration>, body: &[u8]) -> Delivery {
    match status {
        status if status.is_success() => {
            let answer = ExportLogsServiceResponse::decode(body).unwrap_or_default();
            let partial = answer.partial_success.unwrap_or_default();
            let message = Some(partial.error_message).filter(|message| !message.is_empty());
            Delivery::Answered {
                refused: u64::try_from(partial.rejected_log_records).unwrap_or(0),
                message: message.map(|message| shown(&message)),
            }
        }
        // "Retryable Response Codes" of the specification.
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => Delivery::TryAgain { after, message: status.to_string() },
        // The message of a `google.rpc.Status` is in the second field; a proxy answers with a page.
        status => {
            let said = Status::decode(body).map(|status| status.message).unwrap_or_default();
            let message = if said.is_empty() { status.to_string() } else { format!("{status}: {said}") };
            Delivery::Answered { refused: u64::MAX, message: Some(shown(&message)) }
        }
    }
}

/// The message of an error response, `google.rpc.Status`; its details are for programs.
#[derive(Clone, PartialEq, prost::Message)]
struct Status {
    #[prost(string, tag = "2")]
    message: String,
}

/// A collector's message as it can be shown.
fn shown(message: &str) -> String {
    cut(&escape(message), MAX_MESSAGE).into_owned()
}

/// The time that `Retry-After` asks for: seconds or a date.
fn wait(text: &str, now: Timestamp) -> Option<Duration> {
    let wait = if let Ok(seconds) = text.trim().parse() {
        Duration::from_secs(seconds)
    } else {
        let then = rfc2822::DateTimeParser::new().parse_timestamp(text.trim()).ok()?;
        Duration::try_from(then.duration_since(now)).unwrap_or(Duration::ZERO)
    };
    Some(wait.min(LONGEST_WAIT))
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsPartialSuccess;

    use super::*;

    fn judged(status: u16, body: &[u8]) -> Delivery {
        judge(StatusCode::from_u16(status).unwrap(), Some(Duration::from_secs(7)), body)
    }

    #[test]
    fn a_status_means_what_the_specification_says() {
        assert_eq!(judged(200, &[]), Delivery::Answered { refused: 0, message: None });
        for status in [429, 502, 503, 504] {
            let Delivery::TryAgain { after, .. } = judged(status, b"") else { panic!("{status}") };
            assert_eq!(after, Some(Duration::from_secs(7)));
        }
        for status in [301, 400, 401, 404, 413, 500, 501] {
            let Delivery::Answered { refused, .. } = judged(status, b"<html>") else { panic!("{status}") };
            assert_eq!(refused, u64::MAX, "{status}");
        }
        let body = Status { message: "no\u{1b}[2Jtenant".to_owned() }.encode_to_vec();
        let Delivery::Answered { message: Some(message), .. } = judged(400, &body) else { panic!() };
        assert_eq!(message, "400 Bad Request: no\\u{1b}[2Jtenant");
    }

    #[test]
    fn a_partial_success_refuses_some() {
        let answer = |rejected_log_records, error_message: &str| {
            let partial =
                ExportLogsPartialSuccess { rejected_log_records, error_message: error_message.into() };
            judged(200, &ExportLogsServiceResponse { partial_success: Some(partial) }.encode_to_vec())
        };
        let message = Some("too old".to_owned());
        assert_eq!(answer(3, "too old"), Delivery::Answered { refused: 3, message: message.clone() });
        assert_eq!(answer(0, "too old"), Delivery::Answered { refused: 0, message });
        assert_eq!(answer(-1, ""), Delivery::Answered { refused: 0, message: None });
    }

    #[test]
    fn a_collector_says_when_to_try_again() {
        let now = "2026-03-01T12:00:00Z".parse().unwrap();
        let seconds = |text| wait(text, now).map(|wait| wait.as_secs());
        assert_eq!(seconds("3"), Some(3));
        assert_eq!(seconds("Sun, 01 Mar 2026 12:00:09 GMT"), Some(9));
        assert_eq!(seconds("Sun, 01 Mar 2026 11:00:00 GMT"), Some(0));
        assert_eq!(seconds("99999999"), Some(300));
        assert_eq!(seconds("soon"), None);
    }
}
