//! The HTTP server of `--metrics`: `/metrics`, and `/healthz` and `/readyz` for monitoring tcpclose itself.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{SharedMetrics, lock};

/// How many connections are served at the same time; more wait until one of them ends.
const MAX_CONNECTIONS: usize = 16;

/// How long a request may take to arrive.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a connection may stay open. A client that collects every few seconds opens a new one now and
/// then.
const LIFETIME: Duration = Duration::from_mins(5);

/// The content type of OpenMetrics 1.0, which Prometheus requests.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A listening socket for clients that collect metrics.
pub struct Server {
    listener: TcpListener,
    metrics: SharedMetrics,
    room: Arc<Semaphore>,
}

impl Server {
    /// Listens at `address`.
    ///
    /// # Errors
    /// The address cannot be used.
    pub async fn bind(address: SocketAddr, metrics: SharedMetrics) -> Result<Self> {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot serve metrics at {address} (--metrics)"))?;
        Ok(Self { listener, metrics, room: Arc::new(Semaphore::new(MAX_CONNECTIONS)) })
    }

    /// Serves until the trace ends. It runs in the thread of the trace, so that an answer also shows that the
    /// trace is alive.
    pub async fn run(self) {
        loop {
            let Ok(permit) = Arc::clone(&self.room).acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(serve(stream, Arc::clone(&self.metrics), permit))),
                // There is no descriptor left, or the client has closed. The pause prevents a busy loop.
                Err(error) => {
                    log::warn!("cannot accept a connection for metrics: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn serve(stream: TcpStream, metrics: SharedMetrics, _permit: OwnedSemaphorePermit) {
    let answer = |request: Request<Incoming>| {
        let response = respond(request.method(), request.uri().path(), &metrics);
        async { Ok::<_, Infallible>(response) }
    };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service_fn(answer));
    // It is not an error of the trace if a client disconnects or is not served in time.
    if let Ok(Err(error)) = timeout(LIFETIME, connection).await {
        log::debug!("a connection for metrics has failed: {error}");
    }
}

fn respond(method: &Method, path: &str, metrics: &SharedMetrics) -> Response<Full<Bytes>> {
    let (status, kind, body) = match path {
        _ if !matches!(*method, Method::GET | Method::HEAD) => {
            (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET\n".to_owned())
        }
        "/metrics" => (StatusCode::OK, OPEN_METRICS, lock(metrics).text()),
        // The socket exists only once every program is attached.
        "/healthz" | "/readyz" => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "there are /metrics, /healthz and /readyz\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn paths_and_methods() {
        let metrics = Arc::new(Mutex::new(Metrics::new(Vec::new())));
        let status = |method, path| respond(&method, path, &metrics).status().as_u16();
        for path in ["/metrics", "/healthz", "/readyz"] {
            assert_eq!(status(Method::GET, path), 200, "{path}");
            assert_eq!(status(Method::POST, path), 405, "{path}");
        }
        assert_eq!(status(Method::GET, "/"), 404);
        assert_eq!(status(Method::GET, "/metrics/"), 404);
    }
}
