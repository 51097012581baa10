//! Where lines are sent and what is added to them: from `--otlp` and from the variables of the specification,
//! <https://opentelemetry.io/docs/specs/otel/protocol/exporter/> and
//! <https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>.

use std::time::Duration;

use hyper::{
    HeaderMap, Uri,
    header::{HeaderName, HeaderValue},
};

use crate::failure::Failure;

/// The default endpoint of the specification.
const DEFAULT: &str = "http://localhost:4318";

/// The path of logs, which is appended to an endpoint for all kinds of telemetry.
const PATH: &str = "/v1/logs";

/// How long a request may take, unless `OTEL_EXPORTER_OTLP_TIMEOUT` says otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// How many lines may wait, unless `OTEL_BLRP_MAX_QUEUE_SIZE` says otherwise.
const MAX_LINES: usize = 65_536;

/// What the exporter is told by the user.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The address of the collector's endpoint for logs.
    pub url: Uri,
    /// Further headers of each request.
    pub headers: HeaderMap,
    /// How long a request may take.
    pub patience: Duration,
    /// How many lines may wait.
    pub max_lines: usize,
    /// Further attributes of the resource, and changed ones.
    pub resource: Vec<(String, String)>,
}

impl Settings {
    /// The settings, with the URL of `--otlp`, which is empty if the variables are to name it.
    ///
    /// # Errors
    /// The URL or a variable is not what it has to be.
    pub fn new(url: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        // A variable for logs wins over that for all kinds of telemetry.
        let of_logs = |name: &str| {
            let all = || variable(&format!("OTEL_EXPORTER_OTLP_{name}"));
            variable(&format!("OTEL_EXPORTER_OTLP_LOGS_{name}")).or_else(all)
        };
        let text = match variable("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT") {
            Some(endpoint) if url.is_empty() => endpoint,
            _ => {
                let all = || variable("OTEL_EXPORTER_OTLP_ENDPOINT").unwrap_or_else(|| DEFAULT.to_owned());
                let base = if url.is_empty() { all() } else { url.to_owned() };
                let base = base.trim_end_matches('/');
                format!("{}{PATH}", base.strip_suffix(PATH).unwrap_or(base))
            }
        };
        let mut headers = HeaderMap::new();
        for (name, value) in pairs(of_logs("HEADERS").as_deref().unwrap_or_default()) {
            let named = HeaderName::try_from(&name).ok().zip(HeaderValue::try_from(value).ok());
            let Some((name, mut value)) = named else { return Err(no_header(&name)) };
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        let number = |text: Option<String>| text.and_then(|text| text.trim().parse::<u64>().ok());
        let mut resource = pairs(&variable("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default());
        resource.extend(variable("OTEL_SERVICE_NAME").map(|name| ("service.name".to_owned(), name)));
        Ok(Self {
            url: endpoint(&text)?,
            headers,
            patience: number(of_logs("TIMEOUT")).map_or(PATIENCE, Duration::from_millis),
            max_lines: number(variable("OTEL_BLRP_MAX_QUEUE_SIZE"))
                .map_or(MAX_LINES, |lines| usize::try_from(lines).unwrap_or(usize::MAX)),
            resource,
        })
    }

    /// The host and the port of the endpoint.
    pub fn address(&self) -> (&str, u16) {
        let host = self.url.host().unwrap_or_default();
        // An IPv6 address is in brackets.
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        (host, self.url.port_u16().unwrap_or(80))
    }
}

fn endpoint(text: &str) -> Result<Uri, Failure> {
    let url: Option<Uri> = text.parse().ok();
    // A URL is shown, so it must not have a password in it.
    let is_plain = |url: &Uri| url.authority().is_some_and(|it| !it.as_str().contains('@'));
    let url = url.filter(|url| is_plain(url) && url.host().is_some_and(|host| !host.is_empty()));
    match url {
        Some(url) if url.scheme_str() == Some("http") => Ok(url),
        url => Err(Failure {
            failed: "cannot export lines (--otlp)".to_owned(),
            found: format!("`{text}`"),
            needed: if url.is_some_and(|url| url.scheme_str() == Some("https")) {
                "`http`: tcpclose has no TLS; the collector of this host can forward with it".to_owned()
            } else {
                "the URL of a collector that takes OTLP over HTTP".to_owned()
            },
            fix: format!("--otlp {DEFAULT}"),
        }),
    }
}

fn no_header(name: &str) -> Failure {
    Failure {
        failed: "cannot export lines (--otlp)".to_owned(),
        // Its value may be a secret.
        found: format!("`{}`, which no header can be made of", name.escape_debug()),
        needed: "names and values of HTTP headers".to_owned(),
        fix: "OTEL_EXPORTER_OTLP_HEADERS=api-key=…,tenant=…".to_owned(),
    }
}

/// The pairs of `name=value,name=value`, whose values may be percent-encoded.
fn pairs(text: &str) -> Vec<(String, String)> {
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        Some((percent_decoded(name.trim()), percent_decoded(value.trim())))
    };
    text.split(',').filter_map(pair).filter(|(name, _)| !name.is_empty()).collect()
}

fn percent_decoded(text: &str) -> String {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|_| byte == b'%').and_then(|digits| str::from_utf8(digits).ok());
        if let Some(coded) = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            decoded.push(coded);
            rest = &after[2..];
        } else {
            decoded.push(byte);
            rest = after;
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str, variables: &[(&str, &str)]) -> Result<Settings, Failure> {
        Settings::new(url, |name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[track_caller]
    fn assert_url(url: &str, variables: &[(&str, &str)], expected: &str) {
        assert_eq!(settings(url, variables).unwrap().url, expected);
    }

    #[test]
    fn the_endpoint_comes_from_the_option_or_the_variables() {
        let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://all:1/base/");
        let logs = ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://logs:2/as/it/is");
        assert_url("", &[], "http://localhost:4318/v1/logs");
        assert_url("", &[all], "http://all:1/base/v1/logs");
        assert_url("", &[all, logs], "http://logs:2/as/it/is");
        for url in ["http://x:3", "http://x:3/", "http://x:3/v1/logs"] {
            assert_url(url, &[all, logs], "http://x:3/v1/logs");
        }
        assert_eq!(settings("http://[::1]:4318", &[]).unwrap().address(), ("::1", 4318));
        assert_eq!(settings("http://collector", &[]).unwrap().address(), ("collector", 80));
    }

    #[test]
    fn what_is_no_endpoint_is_named() {
        for wrong in ["4318", "localhost:4318", "ftp://x", "http:", "http://a b", "trace", "http://a:b@c"] {
            let failure = settings(wrong, &[]).unwrap_err();
            assert!(failure.found.contains(wrong) && failure.needed.contains("URL"), "{failure}");
        }
        assert!(settings("https://x", &[]).unwrap_err().needed.contains("TLS"));
    }

    #[test]
    fn other_variables_are_heeded() {
        let found = settings(
            "",
            &[
                ("OTEL_EXPORTER_OTLP_HEADERS", "ignored=1"),
                ("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "api-key=a%3Db%, x-tenant = t "),
                ("OTEL_EXPORTER_OTLP_TIMEOUT", "250"),
                ("OTEL_BLRP_MAX_QUEUE_SIZE", "12"),
                ("OTEL_RESOURCE_ATTRIBUTES", "k8s.node.name=n%201,,broken,=x"),
                ("OTEL_SERVICE_NAME", "closes"),
            ],
        )
        .unwrap();
        let headers: Vec<_> =
            found.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        assert_eq!(headers, [("api-key", &b"a=b%"[..]), ("x-tenant", b"t")]);
        assert_eq!((found.patience, found.max_lines), (Duration::from_millis(250), 12));
        let [node, name] = found.resource.as_slice() else { panic!("{:?}", found.resource) };
        assert_eq!((node.0.as_str(), node.1.as_str()), ("k8s.node.name", "n 1"));
        assert_eq!((name.0.as_str(), name.1.as_str()), ("service.name", "closes"));
        let secret = settings("", &[("OTEL_EXPORTER_OTLP_HEADERS", "a b=secret")]).unwrap_err();
        assert!(!secret.to_string().contains("secret"), "{secret}");
    }
}
