#include "cli/url.h"

#include <gtest/gtest.h>

namespace minke::cli {
namespace {

TEST(ParseUrl, RefusesWhatIsNotAnHttpAddress) {
  for (const char* url : {"", "http://", "https://", "ftp://host", "https//host", "host:80", "http://:80",
                          "http://host:", "http://host:0", "http://host:65536", "http://host:8x",
                          "http://host:+8", "http://a:b:80", "http://[::1", "http://[::1]80", "http://[]:80",
                          "http://user@host", "http://host/a b", "http://host/\r\nx: y"}) {
    EXPECT_EQ(ParseUrl(url).status().code(), absl::StatusCode::kInvalidArgument) << url;
  }
}

TEST(ParseUrl, SplitsHostPortAndPath) {
  const auto expect = [](const char* text, const char* host, const char* port, const char* path) {
    const absl::StatusOr<Url> url = ParseUrl(text);
    ASSERT_TRUE(url.ok()) << text << ": " << url.status();
    EXPECT_EQ(url->host, host) << text;
    EXPECT_EQ(url->port, port) << text;
    EXPECT_EQ(url->path, path) << text;
  };
  expect("http://host", "host", "80", "");
  expect("http://host/", "host", "80", "");
  expect("http://127.0.0.1:8000", "127.0.0.1", "8000", "");
  expect("http://127.0.0.1:8000/v1/", "127.0.0.1", "8000", "/v1");
  expect("http://host/a/b:c", "host", "80", "/a/b:c");
  expect("http://[::1]:8000/v1", "::1", "8000", "/v1");
  expect("http://[::1]", "::1", "80", "");
  expect("https://host", "host", "443", "");
  expect("https://[::1]:8443/v1", "::1", "8443", "/v1");
  EXPECT_EQ(ParseUrl("http://[::1]:8000/v1")->HostPort(), "[::1]:8000");
  EXPECT_FALSE(ParseUrl("http://host")->tls);
  EXPECT_TRUE(ParseUrl("https://host")->tls);
  EXPECT_EQ(ParseUrl("https://[::1]/v1/")->Base(), "https://[::1]:443/v1");
  EXPECT_EQ(ParseUrl("http://host:81")->Base(), "http://host:81");
}

}  // namespace
}  // namespace minke::cli
