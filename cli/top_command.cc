#include "cli/top_command.h"

#include <fcntl.h>
#include <langinfo.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <clocale>
#include <ostream>

#include "absl/time/clock.h"
#include "cli/api_key.h"
#include "cli/http_client.h"
#include "cli/top/render.h"
#include "libs/base/status.h"
#include "libs/base/strings.h"
#include "nlohmann/json.hpp"

namespace minke::cli {
namespace {

constexpr absl::Duration kPeriod = absl::Seconds(1);
constexpr absl::Duration kTimeout = absl::Seconds(2);

absl::StatusOr<nlohmann::json> Fetch(const Endpoint& gateway, const std::string& key) {
  MK_ASSIGN_OR_RETURN(const HttpAnswer answer,
                      HttpGet(gateway, gateway.url.path + "/cluster", kTimeout, key));
  if (answer.status != 200) {
    return absl::FailedPreconditionError(
        StrCat(gateway.url.Base(), "/cluster: ", answer.status, " ", ErrorText(answer.body)));
  }
  return nlohmann::json::parse(answer.body, nullptr, /*allow_exceptions=*/false);
}

bool SpeaksUtf8() {
  std::setlocale(LC_CTYPE, "");
  return std::string_view(::nl_langinfo(CODESET)) == "UTF-8";
}

// The terminal as a full-screen program wants it, given back at the end.
class Screen {
 public:
  Screen() {
    ::tcgetattr(STDIN_FILENO, &before_);
    termios raw = before_;
    raw.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
    ::tcsetattr(STDIN_FILENO, TCSANOW, &raw);
    Write("\x1b[?1049h\x1b[?25l");  // the other screen, no cursor
  }
  ~Screen() {
    Write("\x1b[?25h\x1b[?1049l");
    ::tcsetattr(STDIN_FILENO, TCSANOW, &before_);
  }
  Screen(const Screen&) = delete;
  Screen& operator=(const Screen&) = delete;

  static void FitTo(top::Style& style) {
    winsize size{};
    ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size);
    style.columns = size.ws_col > 0 ? size.ws_col : 80;
    style.rows = size.ws_row > 0 ? size.ws_row : 24;
  }
  // Line by line over what was there: no flicker.
  static void Draw(const std::vector<std::string>& lines) {
    std::string text = "\x1b[H";
    for (size_t i = 0; i < lines.size(); ++i)
      StrAppend(&text, lines[i], "\x1b[K", i + 1 < lines.size() ? "\n" : "");
    Write(text + "\x1b[J");
  }

 private:
  static void Write(std::string_view text) {
    while (!text.empty()) {
      const ssize_t n = ::write(STDOUT_FILENO, text.data(), text.size());
      if (n <= 0) return;  // nobody looks any more
      text.remove_prefix(static_cast<size_t>(n));
    }
  }
  termios before_{};
};

// SIGINT, SIGTERM and the terminal's new size as something to wait for.
class Wishes {
 public:
  Wishes() {
    sigset_t set;
    ::sigemptyset(&set);
    for (const int signal : {SIGINT, SIGTERM, SIGWINCH}) ::sigaddset(&set, signal);
    ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
    fd_ = ::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  }
  ~Wishes() { ::close(fd_); }

  enum class Wish { kNone, kRedraw, kQuit };
  Wish Wait(absl::Duration time) {
    pollfd fds[] = {{fd_, POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}};
    if (::poll(fds, 2, static_cast<int>(std::max<int64_t>(0, absl::ToInt64Milliseconds(time)))) <= 0)
      return Wish::kNone;
    if (fds[1].revents != 0) {
      char key = 0;
      const ssize_t n = ::read(STDIN_FILENO, &key, 1);
      if (n <= 0 || key == 'q' || key == 'Q' || key == 3) return Wish::kQuit;
    }
    signalfd_siginfo info;
    Wish wish = Wish::kNone;
    while (::read(fd_, &info, sizeof info) == sizeof info) {
      if (info.ssi_signo != SIGWINCH) return Wish::kQuit;
      wish = Wish::kRedraw;
    }
    return wish;
  }

 private:
  int fd_ = -1;
};

absl::Status Once(const Endpoint& gateway, const std::string& key, top::Style style, std::ostream& out) {
  MK_ASSIGN_OR_RETURN(const nlohmann::json view, Fetch(gateway, key));
  MK_ASSIGN_OR_RETURN(const std::vector<std::string> lines, top::Render(view, "", style));
  for (const std::string& line : lines) out << line << "\n";
  return absl::OkStatus();
}

absl::Status Follow(const Endpoint& gateway, const std::string& key, top::Style style) {
  // Before the screen changes: a wrong address or key is a line of text and an exit code.
  MK_ASSIGN_OR_RETURN(nlohmann::json view, Fetch(gateway, key));
  MK_RETURN_IF_ERROR(top::Render(view, "", style).status());
  Wishes wishes;
  const Screen screen;
  std::string problem;
  while (true) {
    const absl::Time next = absl::Now() + kPeriod;
    while (absl::Now() < next) {
      Screen::FitTo(style);
      MK_ASSIGN_OR_RETURN(const std::vector<std::string> lines, top::Render(view, problem, style));
      Screen::Draw(lines);
      const auto wish = wishes.Wait(next - absl::Now());
      if (wish == Wishes::Wish::kQuit) return absl::OkStatus();
    }
    auto fresh = Fetch(gateway, key);
    problem = fresh.ok() ? "" : StrCat(StdView(fresh.status().message()), "; trying again");
    if (fresh.ok()) view = *std::move(fresh);
  }
}

}  // namespace

void AddTopFlags(CLI::App& app, TopFlags& flags) {
  app.add_option("--url", flags.url, "of the gateway")->capture_default_str();
  AddClientTlsFlags(app, flags.tls);
  app.add_option("--api-key-file", flags.api_key_file, "the first key in it is used");
  app.add_flag("--once", flags.once, "print one frame and end, as where standard output is no terminal");
}

absl::Status RunTop(const TopFlags& flags, std::ostream& out) {
  MK_ASSIGN_OR_RETURN(const Endpoint gateway, ToEndpoint(flags.url, flags.tls));
  MK_ASSIGN_OR_RETURN(const std::string key, FirstKey(flags.api_key_file));
  const bool terminal = ::isatty(STDOUT_FILENO) != 0;
  top::Style style{.color = terminal, .utf8 = SpeaksUtf8()};
  if (flags.once || !terminal) {
    if (terminal) {
      Screen::FitTo(style);
      style.rows = 0;
    }
    return Once(gateway, key, style, out);
  }
  return Follow(gateway, key, style);
}

}  // namespace minke::cli
