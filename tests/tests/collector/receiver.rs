//! A receiver of OTLP over HTTP that answers as a test tells it to, and keeps what it has taken. Messages are
//! decoded with the official types.

use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, ensure};
use flate2::read::GzDecoder;
use nix::sys::socket::{self, shutdown};
use opentelemetry_proto::tonic::{
    collector::logs::v1::{ExportLogsPartialSuccess, ExportLogsServiceRequest, ExportLogsServiceResponse},
    common::v1::{AnyValue, KeyValue, any_value::Value as Any},
};
use prost::Message;
use serde_json::{Map, Value};
use tcpclose_tests::{netns::Namespace, until};

/// The port that OTLP over HTTP has by convention.
const PORT: u16 = 4318;

/// How a request is answered.
#[derive(Clone, Debug)]
pub enum Reply {
    /// All records are taken.
    Take,
    /// All but the first few records are taken.
    TakeAllBut(usize),
    /// All are taken, and the connection is closed without an answer.
    TakeAndHangUp,
    /// None is taken, and the connection is closed without an answer.
    HangUp,
    /// None is taken, with this status and these headers.
    Refuse(&'static str, &'static [&'static str]),
}

/// A record that was taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    /// The attributes of its resource.
    pub resource: Value,
    /// Its own attributes.
    pub attributes: Value,
    /// Its body.
    pub body: Value,
    /// The name of the event.
    pub name: String,
    /// The severity as text.
    pub severity: String,
    /// Nanoseconds since 1970.
    pub time: u64,
}

#[derive(Default)]
struct Shared {
    replies: VecDeque<Reply>,
    taken: Vec<Taken>,
    /// How many records were refused for good.
    refused: usize,
    /// Heads of requests.
    heads: Vec<String>,
    failures: Vec<String>,
    /// Whether connections are being closed, so that requests end in their middle.
    is_stopped: bool,
}

/// The receiver, in a namespace of its own.
pub struct Receiver {
    namespace: Namespace,
    shared: Arc<Mutex<Shared>>,
    running: Option<(TcpListener, JoinHandle<Vec<Connection>>)>,
}

/// A connection and the thread that serves it.
struct Connection {
    stream: TcpStream,
    server: JoinHandle<()>,
}

impl Receiver {
    /// Starts it.
    pub fn new() -> Result<Self> {
        let mut receiver = Self { namespace: Namespace::new()?, shared: Arc::default(), running: None };
        receiver.start()?;
        Ok(receiver)
    }

    /// The namespace in which its address is reached.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Where it listens.
    pub fn url() -> String {
        format!("http://127.0.0.1:{PORT}")
    }

    /// Starts it again.
    pub fn start(&mut self) -> Result<()> {
        let listener = self.namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", PORT))?))?;
        let (accepting, shared) = (listener.try_clone()?, Arc::clone(&self.shared));
        lock(&shared).is_stopped = false;
        let acceptor = thread::spawn(move || {
            let mut connections = Vec::new();
            while let Ok((stream, _)) = accepting.accept() {
                let Ok(socket) = stream.try_clone() else { continue };
                let shared = Arc::clone(&shared);
                let server = thread::spawn(move || {
                    let end = serve(&socket, &shared);
                    let _ = socket.shutdown(Shutdown::Both);
                    let mut state = lock(&shared);
                    if let Err(error) = end
                        && !state.is_stopped
                    {
                        state.failures.push(format!("{error:#}"));
                    }
                });
                connections.push(Connection { stream, server });
            }
            connections
        });
        self.running = Some((listener, acceptor));
        Ok(())
    }

    /// Stops it: connections are closed, and further ones refused. What has been taken has been answered.
    pub fn stop(&mut self) -> Result<()> {
        let (listener, acceptor) = self.running.take().context("the receiver does not run")?;
        shutdown(listener.as_raw_fd(), socket::Shutdown::Both)?;
        let connections = acceptor.join().unwrap_or_default();
        let mut state = lock(&self.shared);
        state.is_stopped = true;
        for Connection { stream, .. } in &connections {
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(state);
        for Connection { server, .. } in connections {
            let _ = server.join();
        }
        Ok(())
    }

    /// Answers the next requests in these ways; all others are taken.
    pub fn reply(&self, replies: impl IntoIterator<Item = Reply>) {
        lock(&self.shared).replies.extend(replies);
    }

    /// Waits until all those replies have been given.
    pub fn wait_for_replies(&self) -> Result<()> {
        until("every reply was given", || Ok(lock(&self.shared).replies.is_empty().then_some(())))
    }

    /// What has been taken.
    pub fn taken(&self) -> Result<Vec<Taken>> {
        let shared = lock(&self.shared);
        ensure!(shared.failures.is_empty(), "{:?}", shared.failures);
        Ok(shared.taken.clone())
    }

    /// How many records were refused for good.
    pub fn refused(&self) -> usize {
        lock(&self.shared).refused
    }

    /// The heads of all requests.
    pub fn heads(&self) -> Vec<String> {
        lock(&self.shared).heads.clone()
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves the requests of a connection.
fn serve(stream: &TcpStream, shared: &Mutex<Shared>) -> Result<()> {
    let (mut reader, mut writer) = (BufReader::new(stream), stream);
    while let Some((head, body)) = request(&mut reader)? {
        let request = ExportLogsServiceRequest::decode(&*body).context("a body that cannot be decoded")?;
        let mut taken = records(request)?;
        // What is taken is answered before the lock is released, so that the receiver stops before or after.
        let mut state = lock(shared);
        if state.is_stopped {
            return Ok(());
        }
        state.heads.push(head);
        let reply = state.replies.pop_front().unwrap_or(Reply::Take);
        let (status, headers, answer) = match reply {
            Reply::Refuse(status, headers) => {
                if status.starts_with("400") {
                    state.refused += taken.len();
                }
                taken.clear();
                (status, headers, Vec::new())
            }
            Reply::TakeAllBut(number) => {
                let number = number.min(taken.len());
                state.refused += number;
                taken.drain(..number);
                let partial = ExportLogsPartialSuccess {
                    rejected_log_records: number.try_into()?,
                    error_message: "some are too old".to_owned(),
                };
                let answer = ExportLogsServiceResponse { partial_success: Some(partial) };
                ("200 OK", &[][..], answer.encode_to_vec())
            }
            Reply::HangUp => return Ok(()),
            Reply::Take | Reply::TakeAndHangUp => {
                ("200 OK", &[][..], ExportLogsServiceResponse::default().encode_to_vec())
            }
        };
        state.taken.extend(taken);
        if matches!(reply, Reply::TakeAndHangUp) {
            return Ok(());
        }
        let headers = headers.iter().map(|header| format!("{header}\r\n")).collect::<Vec<_>>().concat();
        write!(writer, "HTTP/1.1 {status}\r\n{headers}Content-Type: application/x-protobuf\r\n")?;
        write!(writer, "Content-Length: {}\r\n\r\n", answer.len())?;
        writer.write_all(&answer)?;
    }
    Ok(())
}

/// The head and the body of the next request; `None` if the connection is closed.
fn request(reader: &mut impl BufRead) -> Result<Option<(String, Vec<u8>)>> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        match reader.read_line(&mut head) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    let head = head.to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let mut body = vec![0; length.context("a request without a length")?.trim().parse()?];
    reader.read_exact(&mut body)?;
    if head.lines().any(|line| line == "content-encoding: gzip") {
        let mut plain = Vec::new();
        GzDecoder::new(&*body).read_to_end(&mut plain)?;
        body = plain;
    }
    Ok(Some((head, body)))
}

fn records(request: ExportLogsServiceRequest) -> Result<Vec<Taken>> {
    let mut taken = Vec::new();
    for group in request.resource_logs {
        let resource = object(&group.resource.context("records without a resource")?.attributes)?;
        for record in group.scope_logs.into_iter().flat_map(|scope| scope.log_records) {
            ensure!(record.observed_time_unix_nano >= record.time_unix_nano, "{record:?}");
            taken.push(Taken {
                resource: resource.clone(),
                attributes: object(&record.attributes)?,
                body: json(record.body.as_ref())?,
                name: record.event_name,
                severity: record.severity_text,
                time: record.time_unix_nano,
            });
        }
    }
    Ok(taken)
}

fn object(pairs: &[KeyValue]) -> Result<Value> {
    let mut map = Map::new();
    for pair in pairs {
        let before = map.insert(pair.key.clone(), json(pair.value.as_ref())?);
        ensure!(before.is_none(), "{} is there twice", pair.key);
    }
    Ok(map.into())
}

fn json(value: Option<&AnyValue>) -> Result<Value> {
    Ok(match value.and_then(|value| value.value.as_ref()) {
        None => Value::Null,
        Some(Any::StringValue(text)) => text.as_str().into(),
        Some(Any::BoolValue(value)) => (*value).into(),
        Some(Any::IntValue(number)) => (*number).into(),
        Some(Any::DoubleValue(number)) => (*number).into(),
        Some(Any::ArrayValue(array)) => {
            let values: Result<Vec<_>> = array.values.iter().map(|value| json(Some(value))).collect();
            values?.into()
        }
        Some(Any::KvlistValue(map)) => object(&map.values)?,
        Some(other) => anyhow::bail!("a value of another kind: {other:?}"),
    })
}
