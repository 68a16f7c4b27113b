/* Kills the process it is loaded into just before its N-th call that changes a name on disk or has the disk written.
 *
 * N stands in the file ARMED; while that is not there, nothing is counted. So a test decides when the count begins, and
 * no program has to know of the test. Programs that the process starts are left alone, and so is the thread SPARES: what
 * it makes in advance belongs to no call.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define ARMED "/run/godwit-kill-before"
#define SPARES "spares"

static void step(void)
{
	static atomic_int steps;
	char text[16] = "";

	if (!prctl(PR_GET_NAME, text) && !strcmp(text, SPARES))
		return;
	memset(text, 0, sizeof text);
	int file = open(ARMED, O_RDONLY | O_CLOEXEC);

	if (file < 0)
		return;
	if (read(file, text, sizeof text - 1) > 0 && atomic_fetch_add(&steps, 1) + 1 == atoi(text))
		kill(getpid(), SIGKILL);
	close(file);
}

__attribute__((constructor)) static void alone(void)
{
	unsetenv("LD_PRELOAD");
}

#define STEP(name, parameters, arguments)                                  \
	int name parameters                                                \
	{                                                                  \
		static int (*real) parameters;                             \
		if (!real)                                                 \
			real = (int (*) parameters)dlsym(RTLD_NEXT, #name); \
		step();                                                    \
		return real arguments;                                     \
	}

STEP(mkdir, (const char *path, mode_t mode), (path, mode))
STEP(mkdirat, (int directory, const char *path, mode_t mode), (directory, path, mode))
STEP(rename, (const char *from, const char *to), (from, to))
STEP(renameat, (int above, const char *from, int below, const char *to), (above, from, below, to))
STEP(unlink, (const char *path), (path))
STEP(unlinkat, (int directory, const char *path, int flags), (directory, path, flags))
STEP(rmdir, (const char *path), (path))
STEP(fsync, (int file), (file))
STEP(fdatasync, (int file), (file))
STEP(syncfs, (int file), (file))
