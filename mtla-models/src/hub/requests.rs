//! What the hub is asked, and what of its answers is believed.
//!
//! The addresses are those that the `hf-hub` crate asks. Its own download is not used, because it gives a
//! file its name in the cache before anything was compared, goes on after an interruption even if the
//! server starts over, and takes names for parts of paths as the server sends them.

use super::{Hub, HubError, HubModel, source::is_plain};
use hf_hub::api::RepoInfo;
use std::{error::Error, time::Duration};
use ureq::{
    Agent, Body, RequestBuilder,
    config::RedirectAuthHeaders,
    http::{HeaderMap, Response},
    typestate::WithoutBody,
};

/// The most bytes of the list of a model's files.
const LISTING_LIMIT: u64 = 1 << 24;

/// How often a file may be somewhere else on the same hub.
const REDIRECTS: usize = 5;

/// What names the contents of a file whose bytes are elsewhere.
const LINKED_ETAG: &str = "x-linked-etag";

/// Why a request failed: the network, for which the cache may stand in, or the answer.
pub(super) enum Trouble {
    Network(Box<dyn Error + Send + Sync>),
    Answer(HubError),
}

impl From<HubError> for Trouble {
    fn from(error: HubError) -> Self {
        Self::Answer(error)
    }
}

impl From<ureq::Error> for Trouble {
    fn from(error: ureq::Error) -> Self {
        Self::Network(Box::new(error))
    }
}

/// The files of a model at one commit.
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

/// What the hub says about a file before it sends it.
pub(super) struct Description {
    /// Names the contents: the SHA-256 of large files, the hash that git gives to small ones.
    pub(super) etag: String,
    pub(super) size: u64,
    pub(super) commit: Option<String>,
}

/// The connections of a hub. None waits forever.
pub(super) fn agent() -> Agent {
    let config = Agent::config_builder()
        .user_agent(concat!("mtla/", env!("CARGO_PKG_VERSION")))
        // The bytes as they are, so that a part of them is a part of the file.
        .accept_encoding("identity")
        .http_status_as_error(false)
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .timeout_connect(Some(Duration::from_secs(30)))
        .timeout_recv_response(Some(Duration::from_mins(1)))
        .timeout_per_read(Some(Duration::from_mins(1)))
        .build();
    config.new_agent()
}

impl Hub {
    /// Which files a model has.
    pub(super) fn list(&self, model: &HubModel) -> Result<Listing, Trouble> {
        let url = format!("{}/api/{}", self.endpoint, model.repo().api_url());
        let mut response = self.get(&url).call()?;
        let status = response.status().as_u16();
        if status >= 500 {
            return Err(Trouble::Network(
                format!("{url} gave status {status}").into(),
            ));
        }
        self.check_status(&response, &url, &model.to_string())?;
        let body = response.body_mut().with_config().limit(LISTING_LIMIT);
        let answer = |reason: String| HubError::Answer {
            url: url.clone(),
            reason,
        };
        let bytes = body
            .read_to_vec()
            .map_err(|error| answer(error.to_string()))?;
        let info: RepoInfo =
            serde_json::from_slice(&bytes).map_err(|error| answer(error.to_string()))?;
        if !is_plain(&info.sha) {
            return Err(answer(format!("`{}` is no commit", info.sha.escape_debug())).into());
        }
        Ok(Listing {
            commit: info.sha,
            files: info
                .siblings
                .into_iter()
                .map(|file| file.rfilename)
                .collect(),
        })
    }

    /// The address of a file.
    pub(super) fn url(&self, model: &HubModel, name: &str) -> String {
        let repo = model.repo();
        let (path, revision) = (repo.url(), repo.url_revision());
        format!("{}/{path}/resolve/{revision}/{name}", self.endpoint)
    }

    /// What the hub says about a file. It says so itself, before it sends one to where the bytes are.
    pub(super) fn describe(&self, url: &str, file: &str) -> Result<Description, Trouble> {
        let mut at = url.to_owned();
        for _ in 0..=REDIRECTS {
            let response = once(self.get(&at))?;
            let headers = response.headers();
            let location = header(headers, "location");
            let location = location.filter(|_| response.status().is_redirection());
            let next = location.and_then(|location| same_host(&at, location));
            if let (Some(next), false) = (&next, headers.contains_key(LINKED_ETAG)) {
                next.clone_into(&mut at);
                continue;
            }
            // A file without bytes has no first byte.
            if response.status().as_u16() != 416 {
                self.check_status(&response, &at, file)?;
            }
            let size = match (size(&response), next, location) {
                (None, Some(next), _) => size(&once(self.get(&next))?),
                // Somebody else's server, which the token is no business of.
                (None, None, Some(away)) => size(&once(self.agent.get(away))?),
                (size, ..) => size,
            };
            return description(headers, size)
                .map_err(|reason| HubError::Answer { url: at, reason }.into());
        }
        let reason = "it leads on and on".to_owned();
        Err(HubError::Answer { url: at, reason }.into())
    }

    /// The bytes of a file from one of them on, or from the first if the server knows no better.
    pub(super) fn body(&self, url: &str, from: u64, file: &str) -> Result<(u64, Body), Trouble> {
        let mut request = self.get(url);
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let response = request.call()?;
        self.check_status(&response, url, file)?;
        let start = match response.status().as_u16() {
            206 => range_start(response.headers()),
            _ => Some(0),
        };
        match start.filter(|start| *start == 0 || *start == from) {
            Some(start) => Ok((start, response.into_body())),
            None => Err(HubError::Answer {
                url: url.to_owned(),
                reason: format!("it does not go on from byte {from}"),
            }
            .into()),
        }
    }

    fn get(&self, url: &str) -> RequestBuilder<WithoutBody> {
        let request = self.agent.get(url);
        match &self.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    fn check_status(
        &self,
        response: &Response<Body>,
        url: &str,
        what: &str,
    ) -> Result<(), HubError> {
        match response.status().as_u16() {
            200..=399 => Ok(()),
            status @ (401 | 403 | 404) => Err(HubError::NotFound {
                what: what.to_owned(),
                endpoint: self.endpoint.clone(),
                status,
            }),
            status => Err(HubError::Answer {
                url: url.to_owned(),
                reason: format!("it has status {status}"),
            }),
        }
    }
}

/// Asks for the first byte of a file, without following where the answer leads.
fn once(request: RequestBuilder<WithoutBody>) -> Result<Response<Body>, ureq::Error> {
    let request = request.header("Range", "bytes=0-0");
    request.config().max_redirects(0).build().call()
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Where a redirection leads, if that is on the same host.
fn same_host(url: &str, location: &str) -> Option<String> {
    let host = url.find("://")? + 3;
    let end = url[host..].find('/').map_or(url.len(), |path| host + path);
    let origin = &url[..end];
    if location.starts_with('/') && !location.starts_with("//") {
        return Some(format!("{origin}{location}"));
    }
    let path = location.strip_prefix(origin)?;
    path.starts_with('/').then(|| location.to_owned())
}

/// The bytes of the whole file.
fn size(response: &Response<Body>) -> Option<u64> {
    let headers = response.headers();
    let total = || header(headers, "content-range")?.rsplit('/').next();
    let length = || header(headers, "content-length").filter(|_| response.status() == 200);
    let size = header(headers, "x-linked-size")
        .or_else(total)
        .or_else(length);
    size?.trim().parse().ok()
}

fn range_start(headers: &HeaderMap) -> Option<u64> {
    let range = header(headers, "content-range")?
        .trim()
        .strip_prefix("bytes")?;
    range.split('-').next()?.trim().parse().ok()
}

fn description(headers: &HeaderMap, size: Option<u64>) -> Result<Description, String> {
    let etag = header(headers, LINKED_ETAG).or_else(|| header(headers, "etag"));
    let etag = etag.ok_or("it has no ETag, which names the contents of the file")?;
    let etag = etag.trim().trim_start_matches("W/").trim_matches('"');
    if !is_plain(etag) {
        return Err(format!("`{}` names no contents", etag.escape_debug()));
    }
    Ok(Description {
        etag: etag.to_owned(),
        size: size.ok_or("it does not say how large the file is")?,
        commit: header(headers, "x-repo-commit").map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_redirections_on_the_same_host_are_followed_with_the_token() {
        let at = "https://hub.test:8080/a/b/resolve/main/x";
        assert_eq!(
            same_host(at, "/c?d").as_deref(),
            Some("https://hub.test:8080/c?d")
        );
        let whole = "https://hub.test:8080/c";
        assert_eq!(same_host(at, whole).as_deref(), Some(whole));
        for away in [
            "https://hub.test:80801/c",
            "https://other/c",
            "//other/c",
            "http://hub.test:8080/c",
            "c",
            "",
        ] {
            assert_eq!(same_host(at, away), None, "{away}");
        }
    }
}
